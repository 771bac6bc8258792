"""The loading warp of `attention_prefill_hopper`: tiles of keys and values from the paged cache to shared memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from mini_infer.kernels.attention_prefill_items import announce, draw, take, visit_of


class Ring(NamedTuple):
    """Tiles of keys and values, from the loading warp to the computing groups."""

    key_tiles: Any  # [STAGES, BLOCK_N, HEAD_DIM]
    value_tiles: Any
    key_ready: Any  # [STAGES, 1] barriers
    key_free: Any
    value_ready: Any
    value_free: Any
    cut_ready: Any  # [1] barrier: a tile of values that is not ready yet


class Tile(NamedTuple):
    """A tile whose values are to be copied."""

    rows: Any  # where in the cache its boxes are
    cut: Any  # how many tokens an item's last tile has, 0 if it is full; cut is the box within which they end, if any


@gluon.jit
def _copy_tile(cache, rows, ready, boxes, first_box, BOXES: gl.constexpr, HALVES: gl.constexpr):
    """Begins to copy a tile to the boxes from `first_box` on, [HALVES, BOXES]; it is there when `ready` completes."""
    mbarrier.expect(ready, BOXES * HALVES * cache.block_type.shape[0] * cache.block_type.shape[1] * 2)
    for box in gl.static_range(BOXES):
        for half in gl.static_range(HALVES):
            target = boxes.index(first_box + half * BOXES + box)
            tma.async_copy_global_to_shared(cache, [rows[box], half * cache.block_type.shape[1]], ready, target)


@gluon.jit
def _copy_values(
    values, tile, step, cuts, boxes, ring, BOXES: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr
):
    """Begins to copy the values of the step-th tile; returns how many tiles were cut so far."""
    ROWS: gl.constexpr = values.block_type.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    stage = step % STAGES
    first_box = stage * HALVES * BOXES
    mbarrier.wait(ring.value_free.index(stage), step // STAGES + 1 & 1)
    if tile.cut % ROWS > 0:
        # What follows the last position in its box may be anything; its weights are 0, and 0 times it must be.
        _copy_tile(values, tile.rows, ring.cut_ready, boxes, first_box, BOXES, HALVES)
        mbarrier.wait(ring.cut_ready, cuts & 1)
        cuts += 1
        inside = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) < tile.cut % ROWS
        for half in gl.static_range(HALVES):
            box = boxes.index(first_box + half * BOXES + tile.cut // ROWS)
            value = box.load(layout)
            box.store(gl.where(inside[:, None], value, gl.zeros_like(value)))
        fence_async_shared()
        mbarrier.arrive(ring.value_ready.index(stage))
    else:
        _copy_tile(values, tile.rows, ring.value_ready.index(stage), boxes, first_box, BOXES, HALVES)
    return cuts


@gluon.jit
def load_partition(
    keys,  # the caches, as rows of one token and head each: [rows, HEAD_DIM]
    values,
    block_table_ptr,
    rows_block,  # rows from one block to the next, and from one head to the next
    rows_head,
    table_stride,
    work,
    channel,
    ring,
    SLIDING_WINDOW: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp: draws the items, and copies the tiles of keys and values that they visit, from the last one on.

    The keys of a tile are wanted before the values of the one before, and are copied first, of the next item too.
    """
    ROWS: gl.constexpr = keys.block_type.shape[0]
    DIMS: gl.constexpr = keys.block_type.shape[1]
    BOXES: gl.constexpr = BLOCK_N // ROWS
    HALVES: gl.constexpr = HEAD_DIM // DIMS
    key_boxes = ring.key_tiles._reinterpret(keys.dtype, [STAGES * HALVES * BOXES, ROWS, DIMS], keys.layout)
    value_boxes = ring.value_tiles._reinterpret(keys.dtype, [STAGES * HALVES * BOXES, ROWS, DIMS], keys.layout)
    step = 0  # tiles so far
    turn = 0  # items so far
    cuts = 0
    item = take(gl.program_id(0), work, BLOCK_Q)
    announce(item, turn, channel)
    next_item = take(draw(work), work, BLOCK_Q)
    owed = Tile((0,) * BOXES, 0)  # the tile whose keys were copied last; at first there is none
    while item.number < work.items:
        turn += 1
        announce(next_item, turn, channel)
        drawn = draw(work)  # used at the end: it takes a while
        visit = visit_of(item, BLOCK_Q, BLOCK_N, SLIDING_WINDOW)
        table = block_table_ptr + item.seq.to(gl.int64) * table_stride
        for back in range(1, visit.stop - visit.start + 1):
            first = (visit.stop - back) * BLOCK_N
            rows = ()
            for box in gl.static_range(BOXES):
                position = first + box * ROWS
                block = gl.load(table + position // BLOCK_SIZE, mask=position < visit.end, other=0).to(gl.int32)
                row = block * rows_block + item.kv_head * rows_head + position % BLOCK_SIZE
                row = gl.where(position < visit.end, row, -ROWS)  # outside of the cache: zeros are copied
                rows = rows + (row,)  # type: ignore[assignment]  # noqa: RUF005
            stage = step % STAGES
            mbarrier.wait(ring.key_free.index(stage), step // STAGES + 1 & 1)
            _copy_tile(keys, rows, ring.key_ready.index(stage), key_boxes, stage * HALVES * BOXES, BOXES, HALVES)
            if step > 0:
                cuts = _copy_values(values, owed, step - 1, cuts, value_boxes, ring, BOXES, HALVES, STAGES)
            owed = Tile(rows, gl.where(back == 1, visit.end % BLOCK_N, 0))
            step += 1
        item = next_item
        next_item = take(drawn, work, BLOCK_Q)
    if step > 0:
        _copy_values(values, owed, step - 1, cuts, value_boxes, ring, BOXES, HALVES, STAGES)
