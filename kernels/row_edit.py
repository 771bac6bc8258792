"""Editing the decode state: rows are placed, moved, extended or cleared by one small copy and one kernel.

Each line of ``stage`` [num_edits, HEADER + max_blocks] int32 is the whole new content of one row:

    0       the row to write
    1       where its token at hand comes from: another row's number, as it was before all edits, or -1
    2       the token itself, if column 1 is -1
    3..12   the row's fields, in the order of FIELDS; floats as their bits
    13      unused
    14, 15  low and high half of the seed
    16...   the block table

No row is written twice in one call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.common import next_power_of_2, register_op

SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
FIELDS = ("seq_len", "active", "top_k", "count_row", *SAMPLING_FLOATS)
HEADER = 16
FIRST_FIELD = 3
SEED = 14
_NUM_FIELDS = len(FIELDS)


@triton.jit
def _edit_rows_kernel(  # type: ignore[no-untyped-def]
    stage,
    old_tokens,
    tokens,
    fields,
    seeds,
    tables,
    num_rows,
    max_blocks,
    stage_stride,
    table_stride,
    HEADER: tl.constexpr,
    FIRST_FIELD: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    SEED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = stage + tl.program_id(0).to(tl.int64) * stage_stride
    row = tl.load(line).to(tl.int64)
    source = tl.load(line + 1).to(tl.int64)
    given = tl.load(line + 2).to(tl.int64)
    moved = tl.load(old_tokens + tl.maximum(source, 0))
    tl.store(tokens + row, tl.where(source < 0, given, moved))
    for field in tl.static_range(NUM_FIELDS):
        tl.store(fields + field * num_rows + row, tl.load(line + FIRST_FIELD + field))
    low = tl.load(line + SEED).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(line + SEED + 1).to(tl.int64)
    tl.store(seeds + row, (high << 32) | low)
    for start in range(0, max_blocks, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < max_blocks
        tl.store(tables + row * table_stride + index, tl.load(line + HEADER + index, mask=mask), mask=mask)


def _launch_edit_rows(stage: Tensor, tokens: Tensor, fields: Tensor, seeds: Tensor, tables: Tensor) -> None:
    _edit_rows_kernel[(stage.shape[0],)](
        stage,
        tokens.clone(),
        tokens,
        fields,
        seeds,
        tables,
        fields.shape[1],
        tables.shape[1],
        stage.stride(0),
        tables.stride(0),
        HEADER=HEADER,
        FIRST_FIELD=FIRST_FIELD,
        NUM_FIELDS=_NUM_FIELDS,
        SEED=SEED,
        BLOCK=min(1024, next_power_of_2(tables.shape[1])),
    )


def _edit_rows_cpu(stage: Tensor, tokens: Tensor, fields: Tensor, seeds: Tensor, tables: Tensor) -> None:
    rows, source = stage[:, 0].long(), stage[:, 1].long()
    given = stage[:, 2].long()
    tokens.index_copy_(0, rows, torch.where(source < 0, given, tokens[source.clamp(min=0)]))
    fields.index_copy_(1, rows, stage[:, FIRST_FIELD : FIRST_FIELD + _NUM_FIELDS].t())
    seeds.index_copy_(0, rows, stage[:, SEED : SEED + 2].reshape(-1).view(torch.int64))
    tables.index_copy_(0, rows, stage[:, HEADER:])


def _edit_rows_fake(stage: Tensor, tokens: Tensor, fields: Tensor, seeds: Tensor, tables: Tensor) -> None:
    return None


_edit_rows_op = register_op(
    "edit_rows", _edit_rows_fake, _edit_rows_cpu, _launch_edit_rows, mutates=("tokens", "fields", "seeds", "tables")
)


def edit_rows(stage: Tensor, tokens: Tensor, fields: Tensor, seeds: Tensor, tables: Tensor) -> None:
    """Write whole rows of the decode state.

    Args:
        stage: [num_edits, HEADER + max_blocks] int32, one line for each row to write, as the module describes it.
        tokens: [at least num_rows] int64, the token at hand of each row.
        fields: [10, num_rows] int32, in the order of FIELDS.
        seeds: [num_rows] int64.
        tables: [num_rows, max_blocks] int32.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if stage.dtype != torch.int32 or stage.dim() != 2 or stage.shape[1] != HEADER + tables.shape[1]:
        raise ValueError(
            f"stage must be int32 [num_edits, {HEADER + tables.shape[1]}], got {stage.dtype} {tuple(stage.shape)}"
        )
    if fields.dtype != torch.int32 or fields.shape != (_NUM_FIELDS, tables.shape[0]):
        raise ValueError(
            f"fields must be int32 [{_NUM_FIELDS}, {tables.shape[0]}], got {fields.dtype} {tuple(fields.shape)}"
        )
    _edit_rows_op(stage, tokens, fields, seeds, tables)
