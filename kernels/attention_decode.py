"""Decode attention over the paged KV cache: one query token per sequence.

    out[s, h] = sum_j softmax_j(scale * q[s, h] . k_j) * v_j,   max(0, len - window) <= j < len = context_lens[s]

with k_j = key_cache[table[j // block_size], h // group, j % block_size], table = block_tables[s], group = num_heads /
num_kv_heads. query: [num_seqs, num_heads, head_dim] float32, float16 or bfloat16; caches [num_blocks, num_kv_heads,
block_size, head_dim]; block_tables [num_seqs, max_blocks]; context_lens [num_seqs], each >= 1 and counting the current
token, whose K/V is already stored. A padded row is an ordinary row: length 1, table all null block.

On the GPU: flash-decoding (Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The context is
cut at multiples of a constant, so that a row's result depends on nothing but the row; each piece is reduced with an
online softmax (Milakov & Gimelshein 2018) by a program whose tile holds the whole query group of one KV head; pieces
are then merged one after the other by their log-sum-exp. With many rows one program takes all pieces of a row and
merges them itself, the longest rows first; with few rows the pieces go to as many programs as keep the GPU busy, and a
second kernel merges them, with the same operations in the same order. The grid depends on shapes only, lengths are read
from device memory.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import INTERPRET, cdiv, check_attention, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import prefetch, release, wait

SPLIT_TOKENS = 64
MAX_SPLITS = 256
_PROGRAMS = 512
_MERGED_AT_ONCE = 8  # splits whose loads the merging kernel has in flight
_CPU_GATHER_ELEMENTS = 1 << 19  # K elements gathered at once on the CPU: stays in the cache, bounds the scratch memory


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the work of one call is cut up on a GPU.

    Attributes:
        split: Tokens of a piece; like `block_n` and `num_warps` it decides the order in which a row is summed up.
        block_n: Tokens that are loaded at a time.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline over the tiles.
        programs: About how many programs to start: more of them even out ragged lengths, fewer of them find nothing
            to do. From this many rows times KV heads on, no second kernel is needed.
    """

    split: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int

    def __post_init__(self) -> None:
        if self.split % self.block_n != 0:
            raise ValueError(f"split must be a multiple of block_n {self.block_n}, got {self.split}")


def decode_config(head_dim: int, element_size: int, max_tokens: int, num_programs: int) -> DecodeConfig:
    """The configuration for a model, its longest sequence and a batch of `num_programs` rows times KV heads.

    Only the depth of the pipeline depends on the batch: what else did would make a row's result depend on it.
    """
    block_dim = next_power_of_2(head_dim)
    # Short pieces give few rows enough programs; longer ones bound the memory for a long sequence's pieces.
    split = max(SPLIT_TOKENS, next_power_of_2(cdiv(max_tokens, MAX_SPLITS)))
    if element_size == 4:  # no tensor cores: products in registers, which larger tiles would spill
        block_n = 16 if block_dim > 128 else 32
        return DecodeConfig(split, block_n, num_warps=8 if block_dim > 64 else 4, num_stages=2, programs=_PROGRAMS)
    block_n = 32 if block_dim > 128 else 64
    # Many programs wait for each other's turn anyway: fewer at a time, each with more loads in flight, do better.
    num_stages = 3 if num_programs > _PROGRAMS else 2
    return DecodeConfig(split, block_n, num_warps=4, num_stages=num_stages, programs=_PROGRAMS)


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """Decode attention in plain torch, row by row."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group = query.shape[1] // key_cache.shape[1]
    for row, length in enumerate(context_lens.tolist()):
        start = max(0, length - sliding_window) if sliding_window else 0
        blocks = block_tables[row, : -(-length // key_cache.shape[2])].long()
        key = (
            key_cache[blocks].float().transpose(0, 1).flatten(1, 2)[:, start:length]
        )  # [num_kv_heads, tokens, head_dim]
        value = value_cache[blocks].float().transpose(0, 1).flatten(1, 2)[:, start:length]
        q = query[row].float().view(-1, group, query.shape[2]) * scale  # [num_kv_heads, group, head_dim]
        out[row] = (torch.softmax(q @ key.transpose(1, 2), -1) @ value).flatten(0, 1).to(query.dtype)
    return out


@triton.jit
def _merge(total, highest, lse):
    """Join a part of weight 2 ** lse to the parts so far, whose weights sum up to total * 2 ** highest.

    The caller does acc = fma(acc, rescale, part * weight). Spelt out as fma, because every caller must get the same
    bits. An lse of -inf changes nothing.

    Returns:
        (rescale, weight, total, highest).
    """
    new_highest = tl.maximum(highest, lse)
    rescale = tl.exp2(highest - new_highest)
    weight = tl.exp2(lse - new_highest)
    return rescale, weight, tl.fma(total, rescale, weight), new_highest


@triton.jit
def _split_kernel(
    query_ptr,  # [num_seqs, num_heads, HEAD_DIM], strided
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM], strided
    value_cache_ptr,
    block_table_ptr,  # [num_seqs, max_blocks]
    context_len_ptr,  # [num_seqs]
    order_ptr,  # [num_seqs]: the row of each program, if ORDERED
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM] contiguous: written if WHOLE, or for a row that lies in one split
    part_ptr,  # [num_seqs, num_heads, max_splits, HEAD_DIM] float32: each split's normalised output, for the others
    lse_ptr,  # [num_seqs, num_heads, max_splits] float32: its log-sum-exp (base 2)
    num_heads,
    q_stride_seq,
    q_stride_head,
    kc_stride_block,
    kc_stride_head,
    kc_stride_slot,
    vc_stride_block,
    vc_stride_head,
    vc_stride_slot,
    table_stride,
    scale,
    max_blocks,
    max_splits,
    SLIDING_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,  # one program takes all splits of a row's head
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    TILES: tl.constexpr = SPLIT // BLOCK_N
    kv_head = tl.program_id(0).to(tl.int64)
    seq = tl.program_id(1)
    if ORDERED:
        wait(DEPENDENT)  # the order is made within the step
        seq = tl.load(order_ptr + seq)
    seq = seq.to(tl.int64)
    split_stride = tl.num_programs(2)
    table = block_table_ptr + seq * table_stride
    columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    group = tl.arange(0, BLOCK_GROUP)  # [BLOCK_GROUP] query heads of this KV head
    dims = tl.arange(0, BLOCK_DIM)  # [BLOCK_DIM]
    heads = kv_head * GROUP + group

    # The loads that do not wait for the length come before it is used. Table entries past it are loaded, not followed.
    # Neither lengths nor tables are written while a step's layers run.
    length = tl.load(context_len_ptr + seq).to(tl.int32)
    lowest = 0  # the first position that the query sees
    if SLIDING_WINDOW > 0:
        lowest = tl.maximum(length - SLIDING_WINDOW, 0)
    first_split = lowest // SPLIT
    split = first_split + tl.program_id(2)
    # Whole tiles below the window are skipped, so every tile visited holds a visible position.
    first_tile = tl.maximum(lowest - split * SPLIT, 0) // BLOCK_N
    block_index = (split * SPLIT + first_tile * BLOCK_N + columns) // BLOCK_SIZE
    block = tl.load(table + block_index, mask=block_index < max_blocks, other=0)  # [BLOCK_N]
    num_splits = tl.cdiv(length, SPLIT)
    key_base = key_cache_ptr + kv_head * kc_stride_head
    value_base = value_cache_ptr + kv_head * vc_stride_head
    if DEPENDENT and not ORDERED:
        # The first tile's K/V into the L2 cache, which the other kernels' writes go through too.
        follow = split * SPLIT + first_tile * BLOCK_N + columns < length
        here = tl.where(follow, block, 0).to(tl.int64)  # of the null block where there is nothing
        line = tl.arange(0, (BLOCK_DIM + 63) // 64) * 64
        slot = (columns % BLOCK_SIZE).to(tl.int64)
        prefetch(key_base + (here * kc_stride_block + slot * kc_stride_slot)[:, None] + line[None, :])
        prefetch(value_base + (here * vc_stride_block + slot * vc_stride_slot)[:, None] + line[None, :])
    if not ORDERED:
        wait(DEPENDENT)
    if split >= num_splits:
        return

    q_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_source = query_ptr + seq * q_stride_seq + heads[:, None] * q_stride_head + dims[None, :]
    query = tl.load(q_source, mask=q_mask, other=0.0)  # [BLOCK_GROUP, BLOCK_DIM]
    if UPCAST_DOT:
        query = query.to(tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * 1.4426950408889634  # exp2 is the hardware's exponential
    row = seq * num_heads + heads  # [BLOCK_GROUP]
    # This program's splits are split, split + split_stride, ...: how many there are depends on the batch, what each
    # gives does not. Their tiles are one loop, so that the loads run on from one split into the next.
    more = (num_splits - 1 - split) // split_stride
    last_split = split + more * split_stride
    num_tiles = more * TILES + tl.cdiv(tl.minimum(length - last_split * SPLIT, SPLIT), BLOCK_N)
    highest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)  # of the running split
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    row_highest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)  # of the splits merged; unused unless WHOLE
    row_total = tl.zeros([BLOCK_GROUP], tl.float32)
    row_acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for tile in range(first_tile, num_tiles):
        position = (split + tile // TILES * split_stride) * SPLIT + tile % TILES * BLOCK_N + columns  # [BLOCK_N]
        visible = position < length
        if SLIDING_WINDOW > 0:
            visible = visible & (position >= lowest)
        kv_mask = visible[:, None]
        if HEAD_DIM < BLOCK_DIM:
            kv_mask = kv_mask & (dims < HEAD_DIM)[None, :]
        slot = (position % BLOCK_SIZE).to(tl.int64)
        key_rows = block.to(tl.int64) * kc_stride_block + slot * kc_stride_slot
        value_rows = block.to(tl.int64) * vc_stride_block + slot * vc_stride_slot
        key = tl.load(key_base + key_rows[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        value = tl.load(value_base + value_rows[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        # The next tile's block ids, so that its keys need not wait for them.
        following = tile + 1
        next_start = (split + following // TILES * split_stride) * SPLIT + following % TILES * BLOCK_N
        block = tl.load(table + (next_start + columns) // BLOCK_SIZE, mask=next_start + columns < length, other=0)
        if UPCAST_DOT:
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
        if following % TILES == 0 or following == num_tiles:
            part = acc / total[:, None]
            lse = highest + tl.log2(total)
            if WHOLE:
                rescale, weight, row_total, row_highest = _merge(row_total, row_highest, lse)
                row_acc = tl.fma(row_acc, tl.broadcast_to(rescale[:, None], row_acc.shape), part * weight[:, None])
            elif first_split + 1 == num_splits:
                target = out_ptr + row[:, None] * HEAD_DIM + dims[None, :]
                tl.store(target, part.to(out_ptr.dtype.element_ty), mask=q_mask)
            else:
                at = row * max_splits + split + tile // TILES * split_stride
                tl.store(part_ptr + at[:, None] * HEAD_DIM + dims[None, :], part, mask=q_mask)
                tl.store(lse_ptr + at, lse, mask=group < GROUP)
            highest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_GROUP], tl.float32)
            acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    if WHOLE:
        target = out_ptr + row[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, (row_acc / row_total[:, None]).to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _combine_kernel(
    part_ptr,  # [num_seqs, num_heads, max_splits, HEAD_DIM] float32
    lse_ptr,  # [num_seqs, num_heads, max_splits] float32, base 2
    context_len_ptr,  # [num_seqs]
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM] contiguous
    num_heads,
    max_splits,
    SLIDING_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    seq = tl.program_id(0).to(tl.int64)
    row = seq * num_heads + tl.program_id(1)
    dims = tl.arange(0, BLOCK_DIM)
    length = tl.load(context_len_ptr + seq).to(tl.int32)
    first = 0  # splits before it lie wholly below the window and were never written
    if SLIDING_WINDOW > 0:
        first = tl.maximum(length - SLIDING_WINDOW, 0) // SPLIT
    num_splits = tl.cdiv(length, SPLIT)
    wait(DEPENDENT)
    if first + 1 == num_splits:
        return  # the row's only split wrote the output itself
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    for start in range(first, num_splits, AT_ONCE):
        for offset in tl.static_range(AT_ONCE):  # unrolled: the loads of all run while the first is merged
            split = start + offset
            at = row * max_splits + split
            lse = tl.load(lse_ptr + at, mask=split < num_splits, other=float("-inf"))
            part = tl.load(part_ptr + at * HEAD_DIM + dims, mask=(dims < HEAD_DIM) & (split < num_splits), other=0.0)
            rescale, weight, total, highest = _merge(total, highest, lse)
            acc = tl.fma(acc, tl.broadcast_to(rescale, acc.shape), part * weight)
    tl.store(out_ptr + row * HEAD_DIM + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def _launch_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
    row_order: Tensor | None = None,
    *,
    config: DecodeConfig | None = None,
) -> Tensor:
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_seqs == 0:
        return out
    block_tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    context_lens = context_lens.contiguous()
    max_blocks = block_tables.shape[1]
    if config is None:
        max_tokens, num_programs = max_blocks * block_size, num_seqs * num_kv_heads
        config = decode_config(head_dim, query.element_size(), max_tokens, num_programs)
    max_splits = cdiv(max_blocks * block_size, config.split)
    split_programs = min(max_splits, max(1, config.programs // (num_seqs * num_kv_heads)))
    whole = split_programs == 1
    parts = lse = out  # not written
    if not whole:
        parts = torch.empty((num_seqs, num_heads, max_splits, head_dim), dtype=torch.float32, device=query.device)
        lse = torch.empty((num_seqs, num_heads, max_splits), dtype=torch.float32, device=query.device)
    block_dim = max(16, next_power_of_2(head_dim))  # tl.dot needs 16 columns
    ordered = whole and row_order is not None
    _split_kernel[(num_kv_heads, num_seqs, split_programs)](
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        row_order if ordered else context_lens,
        out,
        parts,
        lse,
        num_heads,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        block_tables.stride(0),
        scale,
        max_blocks,
        max_splits,
        SLIDING_WINDOW=sliding_window,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=config.split,
        BLOCK_GROUP=max(16, next_power_of_2(num_heads // num_kv_heads)),  # tl.dot needs 16 rows
        BLOCK_DIM=block_dim,
        BLOCK_N=config.block_n,
        WHOLE=whole,
        ORDERED=ordered,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        UPCAST_DOT=INTERPRET,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dependent_launch.options(),
    )
    if not whole:
        _combine_kernel[(num_seqs, num_heads)](
            parts,
            lse,
            context_lens,
            out,
            num_heads,
            max_splits,
            SLIDING_WINDOW=sliding_window,
            HEAD_DIM=head_dim,
            SPLIT=config.split,
            BLOCK_DIM=block_dim,
            AT_ONCE=min(next_power_of_2(max_splits), _MERGED_AT_ONCE),
            num_warps=1,
            **dependent_launch.options(),
        )
    return out


def _paged_attention_cpu(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
    row_order: Tensor | None,
) -> Tensor:
    """Rows of similar length together, scores block by block, so that K and V are copied once and never transposed."""
    block_size = key_cache.shape[2]
    lens: list[int] = context_lens.tolist()
    num_blocks = [-(-length // block_size) for length in lens]
    limit = max(1, _CPU_GATHER_ELEMENTS // key_cache[0].numel())  # blocks at once
    if len(lens) * max(num_blocks, default=0) <= limit:
        most = max(num_blocks, default=0)
        return _attend_rows(query, key_cache, value_cache, block_tables[:, :most], context_lens, scale, sliding_window)
    out = torch.empty(query.shape, dtype=query.dtype)
    order = sorted(range(len(lens)), key=num_blocks.__getitem__, reverse=True)
    first = 0
    while first < len(order):
        most = num_blocks[order[first]]
        count = max(1, limit // most)
        rows = torch.tensor(order[first : first + count])
        out[rows] = _attend_rows(
            query[rows],
            key_cache,
            value_cache,
            block_tables[rows, :most],
            context_lens[rows],
            scale,
            sliding_window,
        )
        first += count
    return out


def _attend_rows(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
) -> Tensor:
    rows, heads, head_dim = query.shape
    _, kv_heads, block_size, _ = key_cache.shape
    blocks = block_tables.shape[1]
    group = heads // kv_heads
    # Past a row's length its table may hold anything: those entries read the null block and are masked below.
    position = torch.arange(blocks * block_size)  # [tokens]
    lens = context_lens.unsqueeze(1)  # [rows, 1]
    hidden = position >= lens  # [rows, tokens]
    if rows > 1:
        block_tables = block_tables.masked_fill(hidden[:, ::block_size], 0)
    if sliding_window:
        hidden |= position < lens - sliding_window
    ids = block_tables.reshape(-1)  # [rows * blocks]
    key = key_cache.index_select(0, ids).float()  # [rows * blocks, kv_heads, block_size, head_dim]
    value = value_cache.index_select(0, ids).float()
    q = (query.float() * scale).view(rows, 1, kv_heads, group, head_dim)
    if blocks > 1:
        q = q.expand(rows, blocks, kv_heads, group, head_dim)
    q = q.reshape(rows * blocks, kv_heads, group, head_dim)
    scores = torch.matmul(q, key.transpose(2, 3)).view(rows, blocks, kv_heads, group, block_size)
    scores = scores.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group, blocks * block_size)
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    weights = torch.softmax(scores, -1).view(rows, kv_heads, group, blocks, block_size)
    weights = weights.permute(0, 3, 1, 2, 4).reshape(rows * blocks, kv_heads, group, block_size)
    out = torch.matmul(weights, value).view(rows, blocks, heads, head_dim).sum(1)
    if not math.isfinite(float(out.sum())):  # a block's last owner may have left a NaN past the length: 0 * NaN
        value = value.masked_fill(hidden.view(rows * blocks, 1, block_size, 1), 0.0)
        out = torch.matmul(weights, value).view(rows, blocks, heads, head_dim).sum(1)
    return out.to(query.dtype)


def _paged_attention_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
    row_order: Tensor | None,
) -> Tensor:
    return query.new_empty(query.shape)


_paged_attention_op = register_op(
    "paged_attention", _paged_attention_fake, cpu=_paged_attention_cpu, cuda=_launch_paged_attention
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
    row_order: Tensor | None = None,
) -> Tensor:
    """Attention of one query token per sequence over its paged context.

    Args:
        query: [num_seqs, num_heads, head_dim].
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of query.
        value_cache: As key_cache.
        block_tables: [num_seqs, max_blocks] int32 or int64; entries past a row's length are never followed.
        context_lens: [num_seqs] int32 or int64, tokens in the context, the current one included; each >= 1.
        scale: Factor on the scores; 1 / sqrt(head_dim) when None.
        sliding_window: w > 0 lets the query at position p see positions (p - w, p] only; 0 is no window.
        row_order: [num_seqs] int32, the rows by descending length: the longest begin first, so that none of them is
            left over when the others are done. For speed only.

    Returns:
        [num_seqs, num_heads, head_dim], dtype of query.
    """
    check_attention(query, key_cache, value_cache, block_tables, context_lens, sliding_window)
    if query.shape[0] != context_lens.shape[0]:
        raise ValueError(f"context_lens must be [{query.shape[0]}] (query's rows), got {tuple(context_lens.shape)}")
    if row_order is not None and (row_order.dtype != torch.int32 or row_order.shape != context_lens.shape):
        raise ValueError(
            f"row_order must be int32 [{query.shape[0]}] (query's rows), got {row_order.dtype} {tuple(row_order.shape)}"
        )
    if scale is None:
        scale = float(query.shape[2]) ** -0.5
    out: Tensor = _paged_attention_op(
        query, key_cache, value_cache, block_tables, context_lens, scale, sliding_window, row_order
    )
    return out
