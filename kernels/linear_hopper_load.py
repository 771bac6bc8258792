"""The loading warp of `linear_hopper`: tiles of the weight and of x to shared memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

from typing import Any, NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


class Ring(NamedTuple):
    """Tiles of x and of the weight, from the loading warp to the others. A stage has several boxes of columns."""

    weight: Any  # [STAGES * BOXES, BLOCK_N, columns of a box]
    x: Any  # [STAGES * BOXES, BLOCK_M, columns of a box]
    ready: Any  # [STAGES, 1] barriers
    free: Any


class Place(NamedTuple):
    """Which tile of the result: of rows of x, and of columns of the result, which are rows of the weight."""

    row: Any
    column: Any


@gluon.jit
def tile_range(tiles, PERSISTENT: gl.constexpr):
    """The tiles of this program, as `range` takes them; not persistent, it has one."""
    if PERSISTENT:
        return gl.program_id(0), tiles, gl.num_programs(0)
    return 0, 1, 1


@gluon.jit
def place_of(tile, m, BLOCK_M: gl.constexpr, PERSISTENT: gl.constexpr):
    """Where a tile of this program is. Programs take tiles side by side of all rows of x and a few of the weight's, so
    that what they read at a time fits the L2 cache."""
    if PERSISTENT:
        row_tiles = gl.cdiv(m, BLOCK_M)
        return Place(tile % row_tiles, tile // row_tiles)
    return Place(gl.program_id(0), gl.program_id(1))


@gluon.jit
def _copy_weight(weight_tiles, at, step, stage, ring, BOXES: gl.constexpr, GATED: gl.constexpr):
    """Begins to copy the weight of a step to a stage."""
    BLOCK_N: gl.constexpr = ring.weight.shape[1]
    COLUMNS: gl.constexpr = ring.weight.shape[2]
    for box in gl.static_range(BOXES):
        target = ring.weight.index(stage * BOXES + box)
        column = (step * BOXES + box) * COLUMNS
        if GATED:
            target = target._reinterpret(weight_tiles.dtype, weight_tiles.block_type.shape, weight_tiles.layout)
            place = [at.column * (BLOCK_N // 16), 0, 0, column]
            tma.async_copy_global_to_shared(weight_tiles, place, ring.ready.index(stage), target)
        else:
            place = [at.column * BLOCK_N, column]
            tma.async_copy_global_to_shared(weight_tiles, place, ring.ready.index(stage), target)


@gluon.jit
def _copy_x(x_tiles, at, step, stage, ring, BOXES: gl.constexpr):
    """Begins to copy x's part of a step to a stage."""
    BLOCK_M: gl.constexpr = ring.x.shape[1]
    COLUMNS: gl.constexpr = ring.x.shape[2]
    for box in gl.static_range(BOXES):
        place = [at.row * BLOCK_M, (step * BOXES + box) * COLUMNS]
        target = ring.x.index(stage * BOXES + box)
        tma.async_copy_global_to_shared(x_tiles, place, ring.ready.index(stage), target)


@gluon.jit
def load_partition(
    x_tiles,
    weight_tiles,
    out_tiles,
    m,
    first,
    steps,
    tiles,
    ring,
    out_smem,
    residual_ready,
    BOXES: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    ADD: gl.constexpr,
    PERSISTENT: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The loading warp: every step's weight and x to shared memory, and the residual where there is one to add to."""
    BLOCK_N: gl.constexpr = ring.weight.shape[1]
    BLOCK_M: gl.constexpr = ring.x.shape[1]
    BYTES: gl.constexpr = (BLOCK_N + BLOCK_M) * BOXES * ring.x.shape[2] * 2
    start, last, stride = tile_range(tiles, PERSISTENT)
    ahead = gl.minimum(steps, STAGES)  # weights before the kernel before is done
    at = place_of(start, m, BLOCK_M, PERSISTENT)
    for step in range(ahead):
        mbarrier.expect(ring.ready.index(step), BYTES)
        _copy_weight(weight_tiles, at, first + step, step, ring, BOXES, GATED)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if ADD:
        mbarrier.expect(residual_ready, BLOCK_M * BLOCK_N * 2)
        place = [at.row * BLOCK_M, at.column * BLOCK_N]
        tma.async_copy_global_to_shared(out_tiles, place, residual_ready, out_smem)
    before = 0
    for tile in range(start, last, stride):
        at = place_of(tile, m, BLOCK_M, PERSISTENT)
        for step in range(steps):
            count = before + step
            stage = count % STAGES
            if count >= ahead:
                mbarrier.wait(ring.free.index(stage), count // STAGES + 1 & 1)
                mbarrier.expect(ring.ready.index(stage), BYTES)
                _copy_weight(weight_tiles, at, first + step, stage, ring, BOXES, GATED)
            _copy_x(x_tiles, at, first + step, stage, ring, BOXES)
        before += steps
