"""Prefill attention for Hopper GPUs: one warp loads, the others compute. See `attention_prefill` for what it computes.

FlashAttention-3 (Shah et al. 2024, https://arxiv.org/abs/2407.08608) over the paged cache, in Gluon, Triton's language
for kernels that say which warp does what. One warp has the tensor memory accelerator copy tiles of keys and values to
shared memory, as far ahead as there is room. Two groups of four warps take half of a tile's query rows each: while one
is at its softmax the tensor cores have the other's products, and within a group the product of the weights and values
of one tile goes on during the softmax of the next.

A program stays on each multiprocessor, and computes one tile of queries after another (`attention_prefill_items`). The
loading warp (`attention_prefill_load`) goes on to the next one's keys while this one's are computed; its queries are
fetched meanwhile, too.

A row's result does not depend on where its chunk begins, nor on which program computes it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mini_infer.kernels.attention_prefill_items import LANES, Channel, Work, listen, tiles
from mini_infer.kernels.attention_prefill_load import Ring, load_partition
from mini_infer.kernels.common import ALIGNMENT, multiprocessors, on_hopper

_BLOCK_M = 128  # query rows of a tile: tokens times query heads of a KV head
_BLOCK_N = 128  # tokens of the context in a tile
_STAGES = 2  # tiles of keys, and as many of values, in shared memory
_BOX_ROWS = 16  # tokens of a block that one copy takes at most
_BOX_DIMS = 64  # elements of a head that one copy takes: the 128 bytes over which shared memory is swizzled
_COMPUTE_REGISTERS, _LOAD_REGISTERS = 232, 40  # of a thread; what a multiprocessor has for 12 warps is used up


def supports(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether this kernel takes the arguments, caches of the same strides; else that of `attention_prefill` does."""
    _, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    stride_block, stride_head, stride_slot, _ = key_cache.stride()
    return (
        on_hopper()
        and query.element_size() == 2
        and head_dim in (64, 128)
        and num_heads // num_kv_heads <= _BLOCK_M
        and block_size >= 8  # shared memory is swizzled over 8 rows
        and block_size & (block_size - 1) == 0
        and stride_block % stride_slot == 0
        and stride_head % stride_slot == 0
        and all(stride % 16 == 0 for stride in (stride_slot, query.stride(0), query.stride(1)))
        and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in (query, key_cache, value_cache))
    )


@gluon.jit
def _query_places(item, rows, stride_token, stride_head, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Where a tile's query rows are.

    Returns:
        (place of the first row, int64; of the others from there, [ROWS] int32; which of them there are)
    """
    start = (item.q_start + item.first).to(gl.int64) * stride_token + item.kv_head * GROUP * stride_head
    local = rows // GROUP
    inside = (rows < BLOCK_Q * GROUP) & (local < item.q_len - item.first)
    return start, local * stride_token + rows % GROUP * stride_head, inside


@gluon.jit
def _fetch_queries(item, query_ptr, stride_token, stride_head, rows, dims, GROUP: gl.constexpr, BLOCK_Q, smem, ready):
    """Begins to copy a group's query rows; they are there when `ready` completes."""
    start, place, inside = _query_places(item, rows, stride_token, stride_head, GROUP, BLOCK_Q)
    source = query_ptr + start + (place[:, None] + dims[None, :])
    async_copy.async_copy_global_to_shared(smem, source, mask=inside[:, None])
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _masked(scores, tile, position, SLIDING_WINDOW: gl.constexpr):
    """A tile's scores [ROWS, BLOCK_N]: -inf for tokens that the one at `position` [ROWS] does not see."""
    BLOCK_N: gl.constexpr = scores.shape[1]
    target = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, scores.type.layout))
    visible = target[None, :] <= position[:, None]
    if SLIDING_WINDOW > 0:
        visible = visible & (target[None, :] > position[:, None] - SLIDING_WINDOW)
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _softmax(scores, highest, total, scale_log2):
    """One step of the online softmax, of scores [ROWS, BLOCK_N], with highest and total [ROWS] of the tiles before.

    Returns:
        (weights [ROWS, BLOCK_N], highest, total, what the sums so far are to be multiplied with [ROWS])
    """
    new_highest = gl.maximum(highest, gl.max(scores, axis=1) * scale_log2)
    # A row may see nothing of this tile and of those before it: subtract 0, not -inf.
    shift = gl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = gl.exp2(gl.fma(scores, gl.full_like(scores, scale_log2), gl.zeros_like(scores) - shift[:, None]))
    rescale = gl.exp2(highest - shift)
    return weights, new_highest, total * rescale + gl.sum(weights, axis=1), rescale


@gluon.jit
def _compute_partition(
    PART: gl.constexpr,
    query_ptr,
    out_ptr,
    num_heads,
    q_stride_token,
    q_stride_head,
    scale,
    items,
    channel,
    ring,
    query_smem,  # [2 * 2, ROWS, HEAD_DIM]: of this item and the next one, for both groups
    query_ready,
    SLIDING_WINDOW: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A computing group: attention of the rows PART * ROWS and following of every tile of queries.

    Tiles of keys are visited from the last one back: as a rule it is the only one to be masked, and the first product
    and softmax, with which nothing goes on at the same time, are the same code for every item.
    """
    ROWS: gl.constexpr = query_smem.shape[1]
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    lanes: gl.constexpr = HEAD_DIM // 8
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, row_layout))
    local = (PART * ROWS + gl.arange(0, ROWS, layout=score_rows)) // GROUP
    scale_log2 = scale * 1.4426950408889634  # exp2 is the hardware's exponential

    step = 0  # tiles so far
    turn = 0  # items so far
    item = listen(turn, channel)
    _fetch_queries(
        item, query_ptr, q_stride_token, q_stride_head, rows, dims, GROUP, BLOCK_Q, query_smem.index(PART), query_ready
    )
    while item.number < items:
        query = query_smem.index(turn % 2 * 2 + PART)
        start, whole, diagonal, stop, _end = tiles(item, BLOCK_Q, BLOCK_N, SLIDING_WINDOW)
        position = item.length - item.q_len + item.first + local  # [ROWS]
        highest = gl.full([ROWS], float("-inf"), gl.float32, score_rows)
        total = gl.zeros([ROWS], gl.float32, score_rows)
        scores = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
        out = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        mbarrier.wait(query_ready, turn & 1)
        fence_async_shared()  # these copies are the threads' own
        mbarrier.wait(ring.key_ready.index(step % STAGES), step // STAGES & 1)
        key = ring.key_tiles.index(step % STAGES).permute((1, 0))
        scores = warpgroup_mma(query, key, scores, use_acc=False, is_async=True)
        turn += 1
        next_item = listen(turn, channel)
        place = query_smem.index(turn % 2 * 2 + PART)
        _fetch_queries(
            next_item, query_ptr, q_stride_token, q_stride_head, rows, dims, GROUP, BLOCK_Q, place, query_ready
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(ring.key_free.index(step % STAGES))
        scores = _masked(scores, stop - 1, position, SLIDING_WINDOW)
        weights, highest, total, rescale = _softmax(scores, highest, total, scale_log2)
        weights = gl.convert_layout(weights.to(dtype), weight_layout)
        for back in range(2, stop - start + 1):
            tile = stop - back
            value_stage = step % STAGES
            value_phase = step // STAGES & 1
            step += 1
            mbarrier.wait(ring.key_ready.index(step % STAGES), step // STAGES & 1)
            key = ring.key_tiles.index(step % STAGES).permute((1, 0))
            scores = warpgroup_mma(query, key, scores, use_acc=False, is_async=True)
            out = out * gl.convert_layout(rescale, out_rows)[:, None]
            mbarrier.wait(ring.value_ready.index(value_stage), value_phase)
            out = warpgroup_mma(weights, ring.value_tiles.index(value_stage), out, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(ring.key_free.index(step % STAGES))
            if (tile < whole) | (tile >= diagonal):
                scores = _masked(scores, tile, position, SLIDING_WINDOW)
            new_weights, highest, total, rescale = _softmax(scores, highest, total, scale_log2)
            new_weights = gl.convert_layout(new_weights.to(dtype), weight_layout)
            # Complete since long, but a branch: without one the assembler puts the softmax behind the next wait.
            mbarrier.wait(ring.value_ready.index(value_stage), value_phase)
            out, weights, new_weights = warpgroup_mma_wait(0, deps=[out, weights, new_weights])
            mbarrier.arrive(ring.value_free.index(value_stage))
            weights = new_weights
        out = out * gl.convert_layout(rescale, out_rows)[:, None]
        mbarrier.wait(ring.value_ready.index(step % STAGES), step // STAGES & 1)
        out = warpgroup_mma(weights, ring.value_tiles.index(step % STAGES), out, is_async=True)
        out, weights = warpgroup_mma_wait(0, deps=[out, weights])
        mbarrier.arrive(ring.value_free.index(step % STAGES))
        step += 1

        share = 1.0 / gl.where(total == 0.0, 1.0, total)  # 0 only in rows that are not stored
        out = out * gl.convert_layout(share, out_rows)[:, None]
        query.store(out.to(dtype))  # its place is free now; from there whole rows are stored
        first_place, place, inside = _query_places(item, rows, num_heads * HEAD_DIM, HEAD_DIM, GROUP, BLOCK_Q)
        target = out_ptr + first_place + (place[:, None] + dims[None, :])
        gl.store(target, query.load(row_layout), mask=inside[:, None])
        item = next_item
    mbarrier.wait(query_ready, turn & 1)  # nothing may be under way when the program ends


@gluon.jit
def _hopper_prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM], strided
    keys,  # the caches, as rows of one token and head each: [rows, HEAD_DIM]
    values,
    block_table_ptr,  # [num_seqs, max_blocks]
    context_len_ptr,  # [num_seqs]
    start_loc_ptr,  # [num_seqs + 1]
    drawn_ptr,  # [1] int32, 0
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM] contiguous
    items,
    num_seqs,
    num_heads,
    num_kv_heads,
    q_stride_token,
    q_stride_head,
    rows_block,
    rows_head,
    table_stride,
    scale,
    SLIDING_WINDOW: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    query_smem = gl.allocate_shared_memory(dtype, [4, BLOCK_M // 2, HEAD_DIM], keys.layout)
    key_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    value_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], keys.layout)
    item_smem = gl.allocate_shared_memory(gl.int32, [14, LANES], bars)
    query_ready = gl.allocate_shared_memory(gl.int64, [2, 1], bars)  # of each group
    item_told = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    item_heard = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    cut_ready = gl.allocate_shared_memory(gl.int64, [1], bars)
    mbarrier.init(cut_ready, count=1)
    for index in gl.static_range(2):
        mbarrier.init(query_ready.index(index), count=128)  # threads of a group
        mbarrier.init(item_told.index(index), count=1)
        mbarrier.init(item_heard.index(index), count=2)  # groups
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=2)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=2)
    work = Work(context_len_ptr, start_loc_ptr, drawn_ptr, num_seqs, num_kv_heads, items)
    channel = Channel(item_smem, item_told, item_heard)
    ring = Ring(key_smem, value_smem, key_ready, key_free, value_ready, value_free, cut_ready)
    # The arguments are spelt out where they are passed: in a variable, the constants would become values.
    gl.warp_specialize(
        [
            (
                _compute_partition,
                (
                    gl.constexpr(0),
                    query_ptr,
                    out_ptr,
                    num_heads,
                    q_stride_token,
                    q_stride_head,
                    scale,
                    items,
                    channel,
                    ring,
                    query_smem,
                    query_ready.index(0),
                    SLIDING_WINDOW,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_Q,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                _compute_partition,
                (
                    gl.constexpr(1),
                    query_ptr,
                    out_ptr,
                    num_heads,
                    q_stride_token,
                    q_stride_head,
                    scale,
                    items,
                    channel,
                    ring,
                    query_smem,
                    query_ready.index(1),
                    SLIDING_WINDOW,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_Q,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                load_partition,
                (
                    keys,
                    values,
                    block_table_ptr,
                    rows_block,
                    rows_head,
                    table_stride,
                    work,
                    channel,
                    ring,
                    SLIDING_WINDOW,
                    HEAD_DIM,
                    BLOCK_SIZE,
                    BLOCK_Q,
                    BLOCK_N,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def _describe(cache: Tensor) -> TensorDescriptor:
    """A cache as rows of one token and head each, of which a box is copied at a time."""
    num_blocks, _, block_size, head_dim = cache.shape
    stride_block, _, stride_slot, _ = cache.stride()
    rows = num_blocks * stride_block // stride_slot
    box = [min(_BOX_ROWS, block_size), _BOX_DIMS]
    return TensorDescriptor(cache, [rows, head_dim], [stride_slot, 1], box, gl.NVMMASharedLayout(128, 16, 2))


def launch_hopper_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int,
    out: Tensor,
) -> None:
    """Compute prefill attention into `out`, contiguous and of the shape of query.

    The other arguments are those of `paged_prefill_attention`, of which `supports` is true, with block tables of stride
    1 and contiguous lengths and starts.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    num_seqs = context_lens.shape[0]
    group = num_heads // num_kv_heads
    block_q = _BLOCK_M // group
    items = (num_tokens // block_q + num_seqs) * num_kv_heads
    stride_block, stride_head, stride_slot, _ = key_cache.stride()
    _hopper_prefill_kernel[(min(items, multiprocessors(query.device)),)](
        query,
        _describe(key_cache),
        _describe(value_cache),
        block_tables,
        context_lens,
        query_start_loc,
        torch.zeros((1,), dtype=torch.int32, device=query.device),
        out,
        items,
        num_seqs,
        num_heads,
        num_kv_heads,
        query.stride(0),
        query.stride(1),
        stride_block // stride_slot,
        stride_head // stride_slot,
        block_tables.stride(0),
        scale,
        SLIDING_WINDOW=sliding_window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=_BLOCK_M,
        BLOCK_Q=block_q,
        BLOCK_N=_BLOCK_N,
        STAGES=_STAGES,
        COMPUTE_REGISTERS=_COMPUTE_REGISTERS,
        LOAD_REGISTERS=_LOAD_REGISTERS,
        num_warps=4,
    )
