"""What `linear_hopper` does with a tile's sums: norm, bias, gate and residual, and the way to memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma


@gluon.jit
def store_sums(sums_ptr, sums, at, m, n):
    """Stores a program's part of the sums. Lanes that lie side by side have columns that do."""
    rows = at.row * sums.shape[0] + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, sums.type.layout))
    columns = at.column * sums.shape[1] + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, sums.type.layout))
    places = (gl.program_id(2) * m + rows).to(gl.int64)[:, None] * n + columns[None, :]
    gl.store(sums_ptr + places, sums, mask=(rows < m)[:, None] & (columns < n)[None, :])


@gluon.jit
def finish(
    acc,  # [BLOCK_N, BLOCK_M]
    at,
    out_tiles,
    bias_ptr,
    out_squares_ptr,
    m,
    n,
    out_smem,
    residual_ready,
    scale_smem,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NORMS: gl.constexpr,
    ADD: gl.constexpr,
    LEAVES: gl.constexpr,
    PERSISTENT: gl.constexpr,
):
    """What follows the sums, up to the results on their way to memory."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    if NORMS:
        acc = acc * scale_smem.load(gl.SliceLayout(0, layout))[None, :]
    if HAS_BIAS:
        j = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
        if GATED:
            column = at.column * (BLOCK_N // 2) + j // 16 * 8 + j % 8
            known = column < n // 2
            column += j // 8 % 2 * (n // 2)
        else:
            column = at.column * BLOCK_N + j
            known = column < n
        acc = acc + gl.load(bias_ptr + column, mask=known, other=0.0).to(gl.float32)[:, None]
    if GATED:
        gate, up = gl.split(acc.reshape([BLOCK_N // 16, 2, 8, BLOCK_M]).permute((0, 2, 3, 1)))
        acc = (gate / (1.0 + gl.exp(-gate)) * up).reshape([BLOCK_N // 2, BLOCK_M])
    out = gl.permute(acc, (1, 0))  # [BLOCK_M, columns of the result]
    out_layout: gl.constexpr = out.type.layout
    if ADD:
        mbarrier.wait(residual_ready, 0)
        out = out + out_smem.load(out_layout).to(gl.float32)
    out = out.to(out_tiles.dtype)
    if PERSISTENT:
        tma.store_wait(0)  # of the tile before
    out_smem.store(out)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_tiles, [at.row * BLOCK_M, at.column * out_smem.shape[1]], out_smem)
    if LEAVES:
        rows = at.row * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, out_layout))
        # Columns past the end are 0: so are the weight's rows there, and what is added.
        kept = out.to(gl.float32)
        gl.store(out_squares_ptr + at.column * m + rows, gl.sum(kept * kept, axis=1), mask=rows < m)


@gluon.jit
def norm_scale(at, x_squares_ptr, m, k, parts, eps, BLOCK_M: gl.constexpr, BLOCK_PARTS: gl.constexpr):
    """What the rows of x are multiplied with, [BLOCK_M]."""
    part_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    part = gl.arange(0, BLOCK_PARTS, layout=gl.SliceLayout(1, part_layout))
    row = at.row * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, part_layout))
    known = (part < parts)[:, None] & (row < m)[None, :]
    squares = gl.load(x_squares_ptr + (part * m)[:, None] + row[None, :], mask=known, other=0.0)
    return 1.0 / gl.sqrt_rn(gl.sum(squares, axis=0) / k + eps)
