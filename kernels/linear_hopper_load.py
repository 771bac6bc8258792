"""The loading warp of `linear_hopper`: tiles of the weight and of x to shared memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mini_infer.kernels.linear_hopper_tiles import place_of, tile_range


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
