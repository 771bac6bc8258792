"""The work that steps are measured on: it fits the blocks, and no block is in it twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mini_infer.measuring import GREEDY, long_rows, whole_prompts
from mini_infer.step import PlaceRow, PrefillChunk
from mini_infer.typing import NO_ROW
from tests.hypothesis_profiles import PROPERTY

COUNTS = st.integers(1, 60)
BLOCK_SIZES = st.sampled_from([1, 2, 4, 16])


def test_prompts_by_hand() -> None:
    """20 tokens are 8, 8 and 4, in blocks of 3."""
    chunks = whole_prompts(20, longest=8, num_blocks=100, block_size=3, max_chunks=9)
    assert [chunk.block_table for chunk in chunks] == [(1, 2, 3), (4, 5, 6), (7, 8)]
    assert chunks[2] == PrefillChunk("measured 2", 0, (0,) * 4, (7, 8), GREEDY, 0, is_last=True, row=NO_ROW)


def test_prompts_end_where_blocks_or_chunks_do() -> None:
    def lengths(*, num_blocks: int, max_chunks: int) -> list[int]:
        chunks = whole_prompts(20, longest=8, num_blocks=num_blocks, block_size=4, max_chunks=max_chunks)
        return [len(chunk.token_ids) for chunk in chunks]

    assert lengths(num_blocks=5, max_chunks=3) == [8, 8, 4]
    assert lengths(num_blocks=3, max_chunks=3) == [8, 4]
    assert lengths(num_blocks=1, max_chunks=3) == [4]
    assert lengths(num_blocks=5, max_chunks=2) == [8, 8]


@PROPERTY
@given(COUNTS, COUNTS, COUNTS, BLOCK_SIZES, st.integers(1, 5))
def test_prompts_fit(num_tokens: int, longest: int, num_blocks: int, block_size: int, max_chunks: int) -> None:
    """As many tokens as there is room for; every block holds tokens of one prompt."""
    chunks = whole_prompts(
        num_tokens, longest=longest, num_blocks=num_blocks, block_size=block_size, max_chunks=max_chunks
    )
    blocks = [block for chunk in chunks for block in chunk.block_table]
    assert blocks == list(range(1, len(blocks) + 1)) and len(blocks) <= num_blocks
    assert 1 <= len(chunks) <= max_chunks
    assert len({chunk.request_id for chunk in chunks}) == len(chunks)
    for chunk in chunks:
        assert 1 <= len(chunk.token_ids) <= longest and chunk.is_last and chunk.row == NO_ROW
        assert len(chunk.block_table) == -(-len(chunk.token_ids) // block_size)
    total = sum(len(chunk.token_ids) for chunk in chunks)
    assert total == num_tokens or len(blocks) == num_blocks or len(chunks) == max_chunks


def test_rows_by_hand() -> None:
    """10 tokens each and room for 3 more: 4 blocks of 4."""
    rows = long_rows(2, 20, ahead=3, max_blocks=9, num_blocks=100, block_size=4)
    assert rows == (
        PlaceRow(0, 0, 10, (1, 2, 3, 4), GREEDY, 0),
        PlaceRow(1, 0, 10, (5, 6, 7, 8), GREEDY, 0),
    )


def test_rows_where_blocks_are_few() -> None:
    """Fewer rows first, then shorter ones, then none."""

    def lengths(**limits: int) -> list[int]:
        limits = {"max_blocks": 9, "num_blocks": 100, **limits}
        return [row.seq_len for row in long_rows(2, 20, ahead=3, block_size=4, **limits)]

    assert lengths(num_blocks=8) == [10, 10]
    assert lengths(num_blocks=7) == [10]
    assert lengths(num_blocks=3) == [9]
    assert lengths(num_blocks=1) == [1]
    assert lengths(max_blocks=2) == [5, 5]
    assert long_rows(2, 20, ahead=4, max_blocks=9, num_blocks=1, block_size=4) == ()
    assert long_rows(2, 1, ahead=4, max_blocks=9, num_blocks=9, block_size=4) == ()


@PROPERTY
@given(COUNTS, st.integers(1, 500), st.integers(0, 20), COUNTS, COUNTS, BLOCK_SIZES)
def test_rows_fit(
    max_rows: int, num_tokens: int, ahead: int, max_blocks: int, num_blocks: int, block_size: int
) -> None:
    rows = long_rows(
        max_rows, num_tokens, ahead=ahead, max_blocks=max_blocks, num_blocks=num_blocks, block_size=block_size
    )
    assert [row.row for row in rows] == list(range(len(rows))) and len(rows) <= max_rows
    blocks = [block for row in rows for block in row.block_table]
    assert blocks == list(range(1, len(blocks) + 1)) and len(blocks) <= num_blocks
    for row in rows:
        assert row.seq_len >= 1 and row.seq_len + ahead <= len(row.block_table) * block_size
        assert len(row.block_table) <= max_blocks
    assert sum(row.seq_len for row in rows) <= num_tokens
