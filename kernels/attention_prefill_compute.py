"""A computing group of `attention_prefill_hopper`: the online softmax over the tiles of keys, and the products.

Within a group the product of the weights and values of one tile goes on during the softmax of the next.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mini_infer.kernels.attention_prefill_items import listen, visit_of


class Queries(NamedTuple):
    """What is computed from, and to."""

    query_ptr: Any  # [num_tokens, num_heads, HEAD_DIM], strided
    out_ptr: Any  # [num_tokens, num_heads, HEAD_DIM] contiguous
    num_heads: Any
    stride_token: Any  # of the queries
    stride_head: Any
    scale: Any


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
def _fetch_queries(item, queries, rows, dims, GROUP: gl.constexpr, BLOCK_Q, smem, ready):
    """Begins to copy a group's query rows; they are there when `ready` completes."""
    start, place, inside = _query_places(item, rows, queries.stride_token, queries.stride_head, GROUP, BLOCK_Q)
    source = queries.query_ptr + start + (place[:, None] + dims[None, :])
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
def compute_partition(
    PART: gl.constexpr,
    queries,
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

    Tiles of keys are visited from the last one back. The last one is always masked, and is dealt with before the loop;
    of the others only those where the queries cross from one tile into the next, or a window begins.
    """
    ROWS: gl.constexpr = query_smem.shape[1]
    dtype: gl.constexpr = queries.query_ptr.dtype.element_ty
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
    scale_log2 = queries.scale * 1.4426950408889634  # exp2 is the hardware's exponential

    step = 0  # tiles so far
    turn = 0  # items so far
    item = listen(turn, channel)
    _fetch_queries(item, queries, rows, dims, GROUP, BLOCK_Q, query_smem.index(PART), query_ready)
    while item.number < items:
        query = query_smem.index(turn % 2 * 2 + PART)
        visit = visit_of(item, BLOCK_Q, BLOCK_N, SLIDING_WINDOW)
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
        _fetch_queries(next_item, queries, rows, dims, GROUP, BLOCK_Q, place, query_ready)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(ring.key_free.index(step % STAGES))
        scores = _masked(scores, visit.stop - 1, position, SLIDING_WINDOW)
        weights, highest, total, rescale = _softmax(scores, highest, total, scale_log2)
        weights = gl.convert_layout(weights.to(dtype), weight_layout)
        for back in range(2, visit.stop - visit.start + 1):
            tile = visit.stop - back
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
            if (tile < visit.whole) | (tile >= visit.diagonal):
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
        first_place, place, inside = _query_places(item, rows, queries.num_heads * HEAD_DIM, HEAD_DIM, GROUP, BLOCK_Q)
        target = queries.out_ptr + first_place + (place[:, None] + dims[None, :])
        gl.store(target, query.load(row_layout), mask=inside[:, None])
        item = next_item
    mbarrier.wait(query_ready, turn & 1)  # nothing may be under way when the program ends
