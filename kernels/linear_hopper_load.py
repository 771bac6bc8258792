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


@gluon.jit
def _copy_weight(weight_tiles, step, stage, ring, BOXES: gl.constexpr, GATED: gl.constexpr):
    """Begins to copy the weight of a step to a stage."""
    BLOCK_N: gl.constexpr = ring.weight.shape[1]
    COLUMNS: gl.constexpr = ring.weight.shape[2]
    for box in gl.static_range(BOXES):
        target = ring.weight.index(stage * BOXES + box)
        column = (step * BOXES + box) * COLUMNS
        if GATED:
            target = target._reinterpret(weight_tiles.dtype, weight_tiles.block_type.shape, weight_tiles.layout)
            place = [gl.program_id(1) * (BLOCK_N // 16), 0, 0, column]
            tma.async_copy_global_to_shared(weight_tiles, place, ring.ready.index(stage), target)
        else:
            place = [gl.program_id(1) * BLOCK_N, column]
            tma.async_copy_global_to_shared(weight_tiles, place, ring.ready.index(stage), target)


@gluon.jit
def load_partition(
    x_tiles,
    weight_tiles,
    out_tiles,
    first,
    steps,
    ring,
    out_smem,
    residual_ready,
    BOXES: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    ADD: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The loading warp: every step's weight and x to shared memory, and the residual where there is one to add to."""
    BLOCK_N: gl.constexpr = ring.weight.shape[1]
    BLOCK_M: gl.constexpr = ring.x.shape[1]
    COLUMNS: gl.constexpr = ring.x.shape[2]
    BYTES: gl.constexpr = (BLOCK_N + BLOCK_M) * BOXES * COLUMNS * 2
    for step in range(gl.minimum(steps, STAGES)):
        mbarrier.expect(ring.ready.index(step), BYTES)
        _copy_weight(weight_tiles, first + step, step, ring, BOXES, GATED)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if ADD:
        mbarrier.expect(residual_ready, BLOCK_M * BLOCK_N * 2)
        place = [gl.program_id(0) * BLOCK_M, gl.program_id(1) * BLOCK_N]
        tma.async_copy_global_to_shared(out_tiles, place, residual_ready, out_smem)
    for step in range(steps):
        stage = step % STAGES
        if step >= STAGES:
            mbarrier.wait(ring.free.index(stage), step // STAGES + 1 & 1)
            mbarrier.expect(ring.ready.index(stage), BYTES)
            _copy_weight(weight_tiles, first + step, stage, ring, BOXES, GATED)
        for box in gl.static_range(BOXES):
            place = [gl.program_id(0) * BLOCK_M, ((first + step) * BOXES + box) * COLUMNS]
            target = ring.x.index(stage * BOXES + box)
            tma.async_copy_global_to_shared(x_tiles, place, ring.ready.index(stage), target)
