"""Made-up work over real blocks, to measure steps on before there is any request. No torch."""

from __future__ import annotations

from mini_infer.sampling import SamplingParams
from mini_infer.step import PlaceRow, PrefillChunk

GREEDY = SamplingParams(temperature=0.0)


def whole_prompts(
    num_tokens: int, *, longest: int, num_blocks: int, block_size: int, max_chunks: int
) -> tuple[PrefillChunk, ...]:
    """Prompts that fill a prefill step, each computed whole, no block in two of them.

    Args:
        num_tokens: Tokens of the step. The prompts have fewer where blocks or chunks run out.
        longest: Most tokens of a prompt.
        num_blocks: Blocks 1 to ``num_blocks`` may be written.
        block_size: Tokens per block.
        max_chunks: Most prompts.
    """
    chunks: list[PrefillChunk] = []
    free = range(1, num_blocks + 1)
    while num_tokens and free and len(chunks) < max_chunks:
        length = min(num_tokens, longest, len(free) * block_size)
        used = -(-length // block_size)
        name = f"measured {len(chunks)}"
        chunks.append(PrefillChunk(name, 0, (0,) * length, tuple(free[:used]), GREEDY, seed=0, is_last=True))
        free, num_tokens = free[used:], num_tokens - length
    return tuple(chunks)


def long_rows(
    max_rows: int, num_tokens: int, *, ahead: int, max_blocks: int, num_blocks: int, block_size: int
) -> tuple[PlaceRow, ...]:
    """Rows of equal context, no block in two of them: what several rows read, a cache would hand out for nothing.

    Args:
        max_rows: Most rows; there are fewer where blocks are few, rather than shorter ones.
        num_tokens: Tokens of ``max_rows`` rows together.
        ahead: Tokens that each row has room to grow by.
        max_blocks: Most blocks of a row.
        num_blocks: Blocks 1 to ``num_blocks`` may be read and written; at least 1.
        block_size: Tokens per block.

    Returns:
        Edits that place them in rows 0, 1, ...; none if not even one has room to grow.
    """
    seq_len = num_tokens // max_rows
    blocks_each = min(-(-(seq_len + ahead) // block_size), max_blocks, num_blocks)
    seq_len = min(seq_len, blocks_each * block_size - ahead)
    if seq_len < 1:
        return ()
    rows = []
    for row in range(min(max_rows, num_blocks // blocks_each)):
        first = 1 + row * blocks_each
        rows.append(PlaceRow(row, 0, seq_len, tuple(range(first, first + blocks_each)), GREEDY, seed=0))
    return tuple(rows)
