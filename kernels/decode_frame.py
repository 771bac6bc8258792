"""What a decode step does before its first layer and after its sampler, one kernel each.

    embed_rows:    position = max(seq_len - 1, 0);  slot = block_table[position // block_size] * block_size
                   + position % block_size;  hidden = embedding[token_id], or 0 with seq_len 0;  the token is counted
                   (`penalties`)
    advance_rows:  token_id = sampled * active;  seq_len += active;  sampled and its log probability side by side

A row is a sequence's place in the decode batch. A padded row (active 0) is token 0 at length 0 with a table of null
blocks, and stays so. It begins with zeros in place of an embedding, and comes to zeros in every product that has no
bias: tensor cores draw less power multiplying those, and a GPU at its power limit clocks higher for the other rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.penalties import MAX_COUNT, count_token, count_tokens_cpu

_ROWS = 128  # rows of a program of `advance_rows`


def embed_rows_reference(
    token_ids: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    embedding: Tensor,
    block_size: int,
    count_rows: Tensor,
    token_counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain torch."""
    count_tokens_cpu(token_ids, count_rows, token_counts)
    positions = (seq_lens.long() - 1).clamp_(min=0)  # [rows]
    blocks = block_tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
    slots = blocks * block_size + positions % block_size
    return F.embedding(token_ids, embedding).masked_fill((seq_lens == 0)[:, None], 0), positions, slots


def advance_rows_reference(
    token_ids: Tensor, seq_lens: Tensor, active: Tensor, sampled: Tensor, logprobs: Tensor
) -> Tensor:
    """The formula in plain torch."""
    token_ids.copy_(sampled * active)
    seq_lens.add_(active)
    return torch.stack((sampled.int(), logprobs.view(torch.int32)), dim=1)


@triton.jit
def _embed_rows_kernel(
    token_ptr,  # [rows] int64
    seq_len_ptr,  # [rows] int32
    table_ptr,  # [rows, max_blocks] int32
    embedding_ptr,  # [vocab, HIDDEN]
    hidden_ptr,  # [rows, HIDDEN] contiguous
    position_ptr,  # [rows] int64
    slot_ptr,  # [rows] int64
    count_row_ptr,  # [rows] int32
    counts_ptr,  # [count rows, vocab] int16
    table_stride,
    embedding_stride,
    counts_stride,
    MAX_COUNT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ptr + row)
    seq_len = tl.load(seq_len_ptr + row)
    present = (cols < HIDDEN) & (seq_len > 0)
    values = tl.load(embedding_ptr + token * embedding_stride + cols, mask=present, other=0.0)
    tl.store(hidden_ptr + row * HIDDEN + cols, values, mask=cols < HIDDEN)
    if tl.program_id(1) == 0:
        position = tl.maximum(seq_len.to(tl.int64) - 1, 0)
        block = tl.load(table_ptr + row * table_stride + position // BLOCK_SIZE).to(tl.int64)
        tl.store(position_ptr + row, position)
        tl.store(slot_ptr + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
        count_token(tl.load(count_row_ptr + row), token, counts_ptr, counts_stride, MAX_COUNT)


@triton.jit
def _advance_rows_kernel(
    token_ptr,  # [rows] int64
    seq_len_ptr,  # [rows] int32
    active_ptr,  # [rows] int32
    sampled_ptr,  # [rows] int64
    logprob_ptr,  # [rows] int32, the bits of a float32
    packed_ptr,  # [rows, 2] int32
    num_rows,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    active = tl.load(active_ptr + row, mask=mask)
    sampled = tl.load(sampled_ptr + row, mask=mask)
    tl.store(token_ptr + row, sampled * active, mask=mask)
    tl.store(seq_len_ptr + row, tl.load(seq_len_ptr + row, mask=mask) + active, mask=mask)
    tl.store(packed_ptr + 2 * row, sampled.to(tl.int32), mask=mask)
    tl.store(packed_ptr + 2 * row + 1, tl.load(logprob_ptr + row, mask=mask), mask=mask)


def _launch_embed_rows(
    token_ids: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    embedding: Tensor,
    block_size: int,
    count_rows: Tensor,
    token_counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, hidden_size = token_ids.shape[0], embedding.shape[1]
    hidden = torch.empty((num_rows, hidden_size), dtype=embedding.dtype, device=embedding.device)
    positions = torch.empty((num_rows,), dtype=torch.int64, device=embedding.device)
    slots = torch.empty((num_rows,), dtype=torch.int64, device=embedding.device)
    block = min(1024, next_power_of_2(hidden_size))
    _embed_rows_kernel[(num_rows, cdiv(hidden_size, block))](
        token_ids,
        seq_lens,
        block_tables,
        embedding,
        hidden,
        positions,
        slots,
        count_rows,
        token_counts,
        block_tables.stride(0),
        embedding.stride(0),
        token_counts.stride(0),
        MAX_COUNT=MAX_COUNT,
        BLOCK_SIZE=block_size,
        HIDDEN=hidden_size,
        BLOCK=block,
        DEPENDENT=dependent_launch.supported(),  # without launch_pdl: it is a step's first kernel
        num_warps=4,
    )
    return hidden, positions, slots


def _launch_advance_rows(
    token_ids: Tensor, seq_lens: Tensor, active: Tensor, sampled: Tensor, logprobs: Tensor
) -> Tensor:
    num_rows = token_ids.shape[0]
    packed = torch.empty((num_rows, 2), dtype=torch.int32, device=token_ids.device)
    _advance_rows_kernel[(cdiv(num_rows, _ROWS),)](
        token_ids,
        seq_lens,
        active,
        sampled,
        logprobs.view(torch.int32),
        packed,
        num_rows,
        ROWS=_ROWS,
        num_warps=4,
        **dependent_launch.options(),
    )
    return packed


def _embed_rows_fake(
    token_ids: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    embedding: Tensor,
    block_size: int,
    count_rows: Tensor,
    token_counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = embedding.new_empty((token_ids.shape[0], embedding.shape[1]))
    positions, slots = token_ids.new_empty(token_ids.shape), token_ids.new_empty(token_ids.shape)
    return hidden, positions, slots


def _advance_rows_fake(
    token_ids: Tensor, seq_lens: Tensor, active: Tensor, sampled: Tensor, logprobs: Tensor
) -> Tensor:
    return seq_lens.new_empty((token_ids.shape[0], 2))


_embed_rows_op = register_op(
    "embed_rows", _embed_rows_fake, cpu=embed_rows_reference, cuda=_launch_embed_rows, mutates=("token_counts",)
)
_advance_rows_op = register_op(
    "advance_rows",
    _advance_rows_fake,
    cpu=advance_rows_reference,
    cuda=_launch_advance_rows,
    mutates=("token_ids", "seq_lens"),
)


def embed_rows(
    token_ids: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    embedding: Tensor,
    block_size: int,
    count_rows: Tensor,
    token_counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's token at hand goes, and its embedding; and count it, for rows with penalties.

    Args:
        token_ids: [rows] int64, the token at hand of each row, within the embedding.
        seq_lens: [rows] int32, tokens including the one at hand; 0 for a padded row, whose hidden state is zeros.
        block_tables: [rows, max_blocks] int32, wide enough for the lengths.
        embedding: [vocab_size, hidden_size].
        block_size: Tokens per KV cache block.
        count_rows: [rows] int32, each row's row of `token_counts`, no two alike; -1 where tokens are not counted.
        token_counts: [count rows, vocab] int16, as `penalties` describes it; changed.

    Returns:
        (hidden [rows, hidden_size], positions [rows] int64, slots [rows] int64).
    """
    _check_rows(token_ids, seq_lens)
    if block_tables.dtype != torch.int32 or block_tables.dim() != 2 or block_tables.shape[0] != token_ids.shape[0]:
        raise ValueError(
            f"block_tables must be int32 [{token_ids.shape[0]}, max_blocks], got {block_tables.dtype} "
            f"{tuple(block_tables.shape)}"
        )
    if embedding.dim() != 2 or embedding.stride(1) != 1 or block_tables.stride(1) != 1:
        raise ValueError("embedding must be [vocab_size, hidden_size], and it and block_tables dense in their rows")
    if count_rows.dtype != torch.int32 or count_rows.shape != token_ids.shape or not count_rows.is_contiguous():
        raise ValueError(
            f"count_rows must be int32 [{token_ids.shape[0]}], contiguous, got {count_rows.dtype} "
            f"{tuple(count_rows.shape)}"
        )
    if token_counts.dtype != torch.int16 or token_counts.dim() != 2 or token_counts.stride(1) != 1:
        raise ValueError(
            f"token_counts must be int16 [count rows, vocab], dense in its rows, got {token_counts.dtype} "
            f"{tuple(token_counts.shape)}"
        )
    hidden: Tensor
    hidden, positions, slots = _embed_rows_op(
        token_ids, seq_lens, block_tables, embedding, block_size, count_rows, token_counts
    )
    return hidden, positions, slots


def advance_rows(token_ids: Tensor, seq_lens: Tensor, active: Tensor, sampled: Tensor, logprobs: Tensor) -> Tensor:
    """Take the sampled tokens to hand, one token longer, and pack them for the host. Padded rows stay as they are.

    Args:
        token_ids: [rows] int64; changed.
        seq_lens: [rows] int32; changed.
        active: [rows] int32, 1 for a sequence and 0 for padding.
        sampled: [rows] int64.
        logprobs: [rows] float32, contiguous.

    Returns:
        [rows, 2] int32: token id, and the bits of its log probability.
    """
    _check_rows(token_ids, seq_lens)
    for name, tensor, dtype in (
        ("active", active, torch.int32),
        ("sampled", sampled, torch.int64),
        ("logprobs", logprobs, torch.float32),
    ):
        if tensor.dtype != dtype or tensor.shape != token_ids.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {dtype} [{token_ids.shape[0]}], contiguous, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    packed: Tensor = _advance_rows_op(token_ids, seq_lens, active, sampled, logprobs)
    return packed


def _check_rows(token_ids: Tensor, seq_lens: Tensor) -> None:
    if token_ids.dtype != torch.int64 or token_ids.dim() != 1 or not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be int64 [rows], contiguous, got {token_ids.dtype} {tuple(token_ids.shape)}")
    if seq_lens.dtype != torch.int32 or seq_lens.shape != token_ids.shape or not seq_lens.is_contiguous():
        raise ValueError(
            f"seq_lens must be int32 [{token_ids.shape[0]}], contiguous, got {seq_lens.dtype} {tuple(seq_lens.shape)}"
        )
