"""Decode attention over the paged KV cache: one query token per sequence.

    out[s, h] = sum_j softmax_j(scale * q[s, h] . k_j) * v_j,   max(0, len - window) <= j < len = context_lens[s]

with k_j = key_cache[table[j // block_size], h // group, j % block_size], table = block_tables[s], group = num_heads /
num_kv_heads. query: [num_seqs, num_heads, head_dim] float32, float16 or bfloat16; caches [num_blocks, num_kv_heads,
block_size, head_dim]; block_tables [num_seqs, max_blocks]; context_lens [num_seqs], counting the current token, whose
K/V is already stored. Padded rows come last, have length 0 and give zeros.

On the GPU: flash-decoding (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html), its work dealt
out evenly as stream-K does it for products (Osama et al. 2023, https://arxiv.org/abs/2301.03598). The contexts of all
rows and KV heads, cut into tiles of `block_n` tokens, form one long list; each of a fixed number of programs, about as
many as the GPU runs at once, takes an equal stretch of it, wherever that begins and ends. (The change to another row or
head counts for half a tile: short rows take more of them.) So no program waits for a long row, none is left over for
a last wave, and a program's loads run on from one row into the next. A tile holds the whole query group of one KV head;
a program sums up the tiles of a row with an online softmax (Milakov & Gimelshein 2018). A row that lies within one
stretch is done then. Of the others each program leaves its part, and a second kernel merges a row's parts
(`attention_merge`).

The grid depends on shapes only; every program works out its stretch from the lengths in device memory. Where rows are
cut depends on all lengths, and with it the last bits of a row's result; the same batch gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.attention_decode_cpu import paged_attention_cpu
from mini_infer.kernels.attention_merge import merge_parts
from mini_infer.kernels.common import INTERPRET, check_attention, multiprocessors, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import prefetch, release, wait
from mini_infer.kernels.paging import block_ids, check_strides, is_wide, slots

_LEAST_ROWS = 256  # what programs read the lengths of at once: one kernel serves all smaller batches


_TILE_UNITS = 2  # what a tile counts for when the change to another row or head counts for 1


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the work is cut up on a GPU.

    Attributes:
        block_n: Tokens of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline over the tiles.
        programs: Programs for each multiprocessor of the GPU: as many as it has room for at once. A stretch that began
            later would end later.
    """

    block_n: int
    num_warps: int
    num_stages: int
    programs: int


def decode_config(head_dim: int, element_size: int) -> DecodeConfig:
    """The configuration for a model: tiles of 16 KiB, two programs on each multiprocessor with two tiles ahead each."""
    block_dim = next_power_of_2(head_dim)
    if element_size == 4:  # no tensor cores: products in registers, which larger tiles would spill
        block_n, num_warps = (16 if block_dim > 128 else 32), (8 if block_dim > 64 else 4)
        return DecodeConfig(block_n, num_warps, num_stages=2, programs=2)
    return DecodeConfig(min(128, 8192 // block_dim), num_warps=4, num_stages=3, programs=2)


@triton.jit
def _first_tile(length, SLIDING_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first tile that the query of a row sees anything of."""
    if SLIDING_WINDOW > 0:
        return tl.maximum(length - SLIDING_WINDOW, 0) // BLOCK_N
    return length * 0


@triton.jit
def _locate(at, counts, ends, change, num_kv_heads, BLOCK_ROWS: tl.constexpr, TILE_UNITS: tl.constexpr):
    """Where a unit of the list of all work lies. A KV head of a row is `change` units, then TILE_UNITS for each tile.

    Args:
        at: The unit; past the last one is the row past the last.
        counts: [BLOCK_ROWS] tiles of a KV head of each row.
        ends: [BLOCK_ROWS] the unit after the row's last.
        change: Units for the change to another row or head.

    Returns:
        (row, KV head, tile within it, tiles of everything before, the head's last unit).
    """
    row = tl.sum((ends <= at).to(tl.int32), axis=0)
    rows = tl.arange(0, BLOCK_ROWS)
    count = tl.sum(tl.where(rows == row, counts, 0), axis=0)
    offset = at - tl.max(tl.where(rows < row, ends, 0), axis=0)
    units = tl.maximum(count * TILE_UNITS + change, 1)
    kv_head = offset // units
    offset %= units
    tile = tl.maximum(offset - change, 0) // TILE_UNITS
    before = tl.sum(tl.where(rows < row, counts, 0), axis=0) * num_kv_heads
    return row, kv_head, tile, before + kv_head * count + tile, at + units - offset - 1


@triton.jit
def _next_tile(
    row, kv_head, tile, length, length_after, num_kv_heads, SLIDING_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The tile after one: of the same KV head, the next one, or the next row, whose length is `length_after`.

    Returns:
        (row, KV head, tile, length).
    """
    ends_row = (tile + 1) * BLOCK_N >= length
    kv_head = tl.where(ends_row, kv_head + 1, kv_head)
    ends_heads = kv_head == num_kv_heads
    kv_head = tl.where(ends_heads, 0, kv_head)
    row = tl.where(ends_heads, row + 1, row)
    length = tl.where(ends_heads, length_after, length)
    tile = tl.where(ends_row, _first_tile(length, SLIDING_WINDOW, BLOCK_N), tile + 1)
    return row, kv_head, tile, length


@triton.jit
def _attend_kernel(
    query_ptr,  # [num_seqs, num_heads, HEAD_DIM], strided
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM], strided
    value_cache_ptr,  # likewise, with the same strides
    block_table_ptr,  # [num_seqs, max_blocks]
    context_len_ptr,  # [num_seqs]
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM] contiguous: written for rows that lie within one program's stretch
    part_ptr,  # [programs, 2, GROUP, HEAD_DIM] float32: of a row that others began, and of one left to others
    lse_ptr,  # [programs, 2, GROUP] float32: their log-sum-exp (base 2)
    left_ptr,  # [programs, 2] int32: row * num_kv_heads + KV head of the one left to others, or -1; the last of them
    num_seqs,
    num_kv_heads,
    q_stride_seq,
    q_stride_head,
    cache_stride_block,
    cache_stride_head,
    cache_stride_slot,
    table_stride,
    scale,
    SLIDING_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # at least num_seqs
    TILE_UNITS: tl.constexpr,
    WIDE: tl.constexpr,  # whether places in the cache take 64 bits
    PRECISION: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    group = tl.arange(0, BLOCK_GROUP)  # [BLOCK_GROUP] query heads of a KV head
    dims = tl.arange(0, BLOCK_DIM)  # [BLOCK_DIM]

    # This program's stretch. Neither lengths nor tables are written while a step's layers run.
    rows = tl.arange(0, BLOCK_ROWS)
    lengths = tl.load(context_len_ptr + rows, mask=rows < num_seqs, other=0).to(tl.int32)
    counts = tl.cdiv(lengths, BLOCK_N) - _first_tile(lengths, SLIDING_WINDOW, BLOCK_N)  # tiles of a row's KV head
    num_tiles = tl.sum(counts, axis=0) * num_kv_heads
    # With no more tiles than programs each gets one at most, and nobody changes from row to row.
    change = (num_tiles > tl.num_programs(0)).to(tl.int32)
    ends = tl.cumsum(tl.where(lengths > 0, counts * TILE_UNITS + change, 0), axis=0) * num_kv_heads
    num_units = tl.max(ends, axis=0)
    program = tl.program_id(0)
    # Those that get something: the first ones. Within a row each has a tile, for it has TILE_UNITS or more.
    programs = tl.maximum(tl.minimum(tl.num_programs(0), num_tiles), 1)
    begin = (program.to(tl.int64) * num_units // programs).to(tl.int32)
    end = ((program.to(tl.int64) + 1) * num_units // programs).to(tl.int32)
    row, kv_head, tile, begin_tile, _ = _locate(begin, counts, ends, change, num_kv_heads, BLOCK_ROWS, TILE_UNITS)
    _, _, _, end_tile, last_unit = _locate(end, counts, ends, change, num_kv_heads, BLOCK_ROWS, TILE_UNITS)
    if (program >= programs) | (begin_tile == end_tile):
        wait(DEPENDENT)
        tl.store(left_ptr + 2 * program, -1)
        return
    length = tl.load(context_len_ptr + row).to(tl.int32)
    first = _first_tile(length, SLIDING_WINDOW, BLOCK_N)
    tile += first
    block = block_ids(block_table_ptr + row.to(tl.int64) * table_stride, tile, length, BLOCK_N, BLOCK_SIZE)
    length_after = tl.load(context_len_ptr + row + 1, mask=row + 1 < num_seqs, other=0).to(tl.int32)
    if DEPENDENT:
        # The first tile's K/V into the L2 cache, which the other kernels' writes go through too.
        line = tl.arange(0, (BLOCK_DIM + 63) // 64) * 64
        token = block.to(tl.int64) * cache_stride_block + kv_head.to(tl.int64) * cache_stride_head
        token += slots(tile, BLOCK_N, BLOCK_SIZE) * cache_stride_slot
        prefetch(key_cache_ptr + token[:, None] + line[None, :])
        prefetch(value_cache_ptr + token[:, None] + line[None, :])
    after_row, after_head, after_tile, after_length = _next_tile(
        row, kv_head, tile, length, length_after, num_kv_heads, SLIDING_WINDOW, BLOCK_N
    )
    after_table = block_table_ptr + after_row.to(tl.int64) * table_stride
    after_block = block_ids(after_table, after_tile, after_length, BLOCK_N, BLOCK_SIZE)
    length_after = tl.load(context_len_ptr + after_row + 1, mask=after_row + 1 < num_seqs, other=0).to(tl.int32)
    wait(DEPENDENT)

    scale_log2 = tl.cast(scale, tl.float32) * 1.4426950408889634  # exp2 is the hardware's exponential
    own = tile == first  # whether this program has the row's first tile
    left_item = -1
    last_program = (((last_unit.to(tl.int64) + 1) * programs - 1) // num_units).to(tl.int32)  # of what is left
    highest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    group_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = query_ptr + group[:, None] * q_stride_head + dims[None, :]
    for index in range(begin_tile, end_tile):
        positions = tile * BLOCK_N + columns
        visible = positions < length
        if SLIDING_WINDOW > 0:
            visible = visible & (positions >= length - SLIDING_WINDOW)
        kv_mask = visible[:, None]
        if HEAD_DIM < BLOCK_DIM:
            kv_mask = kv_mask & (dims < HEAD_DIM)[None, :]
        places = (block.to(tl.int64) if WIDE else block) * cache_stride_block
        places += slots(tile, BLOCK_N, BLOCK_SIZE) * cache_stride_slot
        places = places[:, None] + dims[None, :]
        head = kv_head.to(tl.int64) * cache_stride_head
        # The same queries for every tile of a row: loaded each time, they are part of the pipeline, and nothing waits
        # for those of the next row.
        offset = row.to(tl.int64) * q_stride_seq + kv_head * GROUP * q_stride_head
        query = tl.load(queries + offset, mask=group_mask, other=0.0)  # [BLOCK_GROUP, BLOCK_DIM]
        key = tl.load(key_cache_ptr + head + places, mask=kv_mask, other=0.0)  # [BLOCK_N, BLOCK_DIM]
        value = tl.load(value_cache_ptr + head + places, mask=kv_mask, other=0.0)
        if UPCAST_DOT:
            query = query.to(tl.float32)
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2  # [BLOCK_GROUP, BLOCK_N]
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        highest = new_highest

        ends_row = (tile + 1) * BLOCK_N >= length
        if ends_row | (index + 1 == end_tile):
            result = acc / total[:, None]
            if own & ends_row:
                out = out_ptr + ((row.to(tl.int64) * num_kv_heads + kv_head) * GROUP + group) * HEAD_DIM
                tl.store(out[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=group_mask)
            else:
                part = (2 * program + own.to(tl.int32)) * GROUP + group
                tl.store(part_ptr + part[:, None] * HEAD_DIM + dims[None, :], result, mask=group_mask)
                tl.store(lse_ptr + part, highest + tl.log2(total), mask=group < GROUP)
                if own:
                    left_item = row * num_kv_heads + kv_head
            highest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_GROUP], tl.float32)
            acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
            own = own | ends_row

        # On to the next tile. The block ids of the one after it are loaded here, and the length of the row after that,
        # so that nothing waits for them when its keys are to be fetched. (Triton 3.6 pipelines no loop that hands a
        # value on as it is from one variable to another: hence the maximum.)
        row, kv_head, tile = tl.maximum(after_row, 0), tl.maximum(after_head, 0), tl.maximum(after_tile, 0)
        length, block = tl.maximum(after_length, 0), tl.maximum(after_block, 0)
        after_row, after_head, after_tile, after_length = _next_tile(
            row, kv_head, tile, length, length_after, num_kv_heads, SLIDING_WINDOW, BLOCK_N
        )
        after_table = block_table_ptr + after_row.to(tl.int64) * table_stride
        after_block = block_ids(after_table, after_tile, after_length, BLOCK_N, BLOCK_SIZE)
        length_after = tl.load(context_len_ptr + after_row + 1, mask=after_row + 1 < num_seqs, other=0).to(tl.int32)
    tl.store(left_ptr + 2 * program, left_item)
    tl.store(left_ptr + 2 * program + 1, last_program)


def _launch_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
    *,
    config: DecodeConfig | None = None,
) -> Tensor:
    check_strides(key_cache, value_cache)
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if num_seqs == 0:
        return out
    block_tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    context_lens = context_lens.contiguous()
    config = config or decode_config(head_dim, query.element_size())
    group = num_heads // num_kv_heads
    programs = multiprocessors(query.device) * config.programs
    parts = torch.empty((programs, 2, group, head_dim), dtype=torch.float32, device=query.device)
    lse = torch.empty((programs, 2, group), dtype=torch.float32, device=query.device)
    left = torch.empty((programs, 2), dtype=torch.int32, device=query.device)
    block_dim = max(16, next_power_of_2(head_dim))  # tl.dot needs 16 columns
    _attend_kernel[(programs,)](
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        out,
        parts,
        lse,
        left,
        num_seqs,
        num_kv_heads,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        scale,
        SLIDING_WINDOW=sliding_window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_GROUP=max(16, next_power_of_2(group)),  # tl.dot needs 16 rows
        BLOCK_DIM=block_dim,
        BLOCK_N=config.block_n,
        BLOCK_ROWS=max(_LEAST_ROWS, next_power_of_2(num_seqs)),
        TILE_UNITS=_TILE_UNITS,
        WIDE=is_wide(key_cache),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        UPCAST_DOT=INTERPRET,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dependent_launch.options(),
    )
    merge_parts(parts, lse, left, context_lens, out, num_kv_heads)
    return out


def _paged_attention_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
) -> Tensor:
    return query.new_empty(query.shape)


_paged_attention_op = register_op(
    "paged_attention", _paged_attention_fake, cpu=paged_attention_cpu, cuda=_launch_paged_attention
)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int = 0,
) -> Tensor:
    """Attention of one query token per sequence over its paged context.

    Args:
        query: [num_seqs, num_heads, head_dim].
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of query.
        value_cache: As key_cache.
        block_tables: [num_seqs, max_blocks] int32 or int64; entries past a row's length are never followed.
        context_lens: [num_seqs] int32 or int64, tokens in the context, the current one included. Padded rows have 0,
            come after all others, and give zeros.
        scale: Factor on the scores, > 0; 1 / sqrt(head_dim) when None.
        sliding_window: w > 0 lets the query at position p see positions (p - w, p] only; 0 is no window.

    Returns:
        [num_seqs, num_heads, head_dim], dtype of query.

    Raises:
        ValueError: shapes or types that do not fit each other; on a GPU also caches of different strides.
    """
    check_attention(query, key_cache, value_cache, block_tables, context_lens, sliding_window)
    if query.shape[0] != context_lens.shape[0]:
        raise ValueError(f"context_lens must be [{query.shape[0]}] (query's rows), got {tuple(context_lens.shape)}")
    if scale is None:
        scale = float(query.shape[2]) ** -0.5
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    out: Tensor = _paged_attention_op(query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window)
    return out
