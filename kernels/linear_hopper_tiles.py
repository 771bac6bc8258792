"""What the warps of a program of `linear_hopper` share: its tiles of the result, and the stages in shared memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
