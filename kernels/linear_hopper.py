"""The matrix product on Hopper GPUs, one warp loading, four or eight computing: `hopper` tiles.

    product              = x @ weight.T + bias
    gated                = silu(g) * u,  [g, u] = x @ weight.T + bias
    with a residual      : r += x @ weight.T + bias

x: [m, k], weight: [n, k], bias: [n] or None, r: [m, n]; float16 or bfloat16, starts and rows aligned to 16 bytes ->
[m, n], or [m, n / 2] with the gate. Sums are float32, in the order of the columns.

As in `linear_tma` a program computes weight_tile @ x_tile.T; here, in Gluon, one warp does nothing but have the tensor
memory accelerator copy tiles to shared memory, as far ahead as there is room. It begins with the weight's, while the
kernel before still runs, and adds x's when that is done: what the two overlap in is weights on their way from memory.
The residual comes the same way, and results leave through shared memory, so that whole lines are written. With
`split_k` > 1 several programs share the columns, and `reduce_splits` adds their sums.

Every program reads its rows of x as well as its weight, from the L2 cache: with many rows of x that is most of what a
multiprocessor takes in. Larger tiles, for which eight warps have the registers, read less of it; so that there are as
many programs as multiprocessors all the same, they share the columns. With the gate and a thousand rows or more there
are many more tiles than multiprocessors: then a program stays on each, and its loading warp goes on to the next tile
while the results of this one are written.

With the gate a tile of the weight's rows holds 8 rows of the gate, the same 8 of up, the next 8 of the gate and so on:
the layout of the sums then has a gate and its up in the same thread.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, multiprocessors, next_power_of_2, on_hopper
from mini_infer.kernels.linear_common import check_tma
from mini_infer.kernels.linear_hopper_finish import finish, norm_scale, store_sums
from mini_infer.kernels.linear_hopper_load import load_partition
from mini_infer.kernels.linear_hopper_tiles import Ring, place_of, tile_range
from mini_infer.kernels.linear_plan import BOX_COLUMNS, Tile
from mini_infer.kernels.linear_reduce import reduce_splits

# Of a thread, by the computing warps: two programs of 4 fit a multiprocessor, or one of 8. The loading warp, and those
# that make up the group of four with it, give most of theirs away.
_REGISTERS = {4: 128, 8: 168}
_LOAD_REGISTERS = 24  # that it keeps

_MANY = 4  # tiles for each multiprocessor, from which on a program stays


@gluon.jit
def _steps_of_program(k, BLOCK_K: gl.constexpr, SPLIT_K: gl.constexpr):
    """This program's steps over the columns: (the first, how many, at least 0)."""
    steps = gl.cdiv(k, BLOCK_K)
    if SPLIT_K == 1:
        return steps * 0, steps
    span = gl.cdiv(steps, SPLIT_K)
    first = gl.program_id(2) * span
    return first, gl.maximum(gl.minimum(steps - first, span), 0)


@gluon.jit
def _sum_tile(before, steps, ring, BOXES: gl.constexpr, STAGES: gl.constexpr, FREES_LAST: gl.constexpr):
    """The sums of a tile, [BLOCK_N, BLOCK_M]; `before` it the program had so many steps."""
    BLOCK_N: gl.constexpr = ring.weight.shape[1]
    BLOCK_M: gl.constexpr = ring.x.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, 16])
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    for step in range(before, before + steps):
        stage = step % STAGES
        mbarrier.wait(ring.ready.index(stage), step // STAGES & 1)
        for box in gl.static_range(BOXES):
            weight = ring.weight.index(stage * BOXES + box)
            acc = warpgroup_mma(weight, ring.x.index(stage * BOXES + box).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(BOXES, deps=[acc])  # the products of the stage before are done
        if step > before:
            mbarrier.arrive(ring.free.index((step - 1) % STAGES))
    acc = warpgroup_mma_wait(0, deps=[acc])
    if FREES_LAST:
        mbarrier.arrive(ring.free.index((before + steps - 1) % STAGES))
    return acc


@gluon.jit
def _compute_partition(
    out_tiles,
    sums_ptr,
    bias_ptr,
    x_squares_ptr,
    out_squares_ptr,
    m,
    n,
    k,
    parts,
    eps,
    steps,
    tiles,
    ring,
    out_smem,
    residual_ready,
    scale_smem,
    BOXES: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_K: gl.constexpr,
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NORMS: gl.constexpr,
    BLOCK_PARTS: gl.constexpr,
    ADD: gl.constexpr,
    LEAVES: gl.constexpr,
    PERSISTENT: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The computing warps: the sums of every tile of the program, and what follows them."""
    BLOCK_M: gl.constexpr = ring.x.shape[1]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    first, last, stride = tile_range(tiles, PERSISTENT)
    before = 0
    for tile in range(first, last, stride):
        at = place_of(tile, m, BLOCK_M, PERSISTENT)
        if NORMS:
            scale_smem.store(norm_scale(at, x_squares_ptr, m, k, parts, eps, BLOCK_M, BLOCK_PARTS))
        acc = _sum_tile(before, steps, ring, BOXES, STAGES, PERSISTENT)
        before += steps
        if SPLIT_K > 1:
            store_sums(sums_ptr, gl.permute(acc, (1, 0)), at, m, n)
        else:
            finish(
                acc,
                at,
                out_tiles,
                bias_ptr,
                out_squares_ptr,
                m,
                n,
                out_smem,
                residual_ready,
                scale_smem,
                GATED,
                HAS_BIAS,
                NORMS,
                ADD,
                LEAVES,
                PERSISTENT,
            )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m", "parts", "tiles"])
def _hopper_linear_kernel(
    x_tiles,  # [m, k] in boxes [BLOCK_M, 64]
    weight_tiles,  # [n, k] in boxes [BLOCK_N, 64]; with the gate [n / 16, 2, 8, k] in boxes [BLOCK_N / 16, 2, 8, 64]
    out_tiles,  # [m, n] or [m, n / 2]; unwritten with SPLIT_K > 1
    sums_ptr,  # with SPLIT_K > 1 [SPLIT_K, m, n] float32
    bias_ptr,  # [n]
    x_squares_ptr,  # with NORMS [parts, m] float32: parts of the sums of the squares of x
    out_squares_ptr,  # with LEAVES [programs along n, m] float32: likewise of what out holds then
    m,
    n,
    k,
    parts,
    eps,
    tiles,  # of the result
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOXES: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT_K: gl.constexpr,  # above 1 there are sums only, and nothing of what follows
    GATED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NORMS: gl.constexpr,
    BLOCK_PARTS: gl.constexpr,
    ADD: gl.constexpr,  # to what out holds
    LEAVES: gl.constexpr,
    PERSISTENT: gl.constexpr,  # programs take tiles in turn; with SPLIT_K 1, and without ADD and LEAVES
    LOAD_REGISTERS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    dtype: gl.constexpr = x_tiles.dtype
    COLUMNS: gl.constexpr = x_tiles.block_type.shape[1]
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    weight_smem = gl.allocate_shared_memory(dtype, [STAGES * BOXES, BLOCK_N, COLUMNS], x_tiles.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * BOXES, BLOCK_M, COLUMNS], x_tiles.layout)
    out_smem = gl.allocate_shared_memory(dtype, out_tiles.block_type.shape, out_tiles.layout)
    scale_smem = gl.allocate_shared_memory(gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    # The last is for the residual. Were it by itself its memory would be put to other use where there is no residual,
    # and what is written over a barrier may be lost.
    free = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], bars)
    residual_ready = free.index(STAGES)
    mbarrier.init(residual_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    ring = Ring(weight_smem, x_smem, ready, free)
    first, steps = _steps_of_program(k, BOXES * COLUMNS, SPLIT_K)
    # The arguments are spelt out where they are passed: in a variable, the constants would become values.
    gl.warp_specialize(
        [
            (
                _compute_partition,
                (
                    out_tiles,
                    sums_ptr,
                    bias_ptr,
                    x_squares_ptr,
                    out_squares_ptr,
                    m,
                    n,
                    k,
                    parts,
                    eps,
                    steps,
                    tiles,
                    ring,
                    out_smem,
                    residual_ready,
                    scale_smem,
                    BOXES,
                    STAGES,
                    SPLIT_K,
                    GATED,
                    HAS_BIAS,
                    NORMS,
                    BLOCK_PARTS,
                    ADD,
                    LEAVES,
                    PERSISTENT,
                    DEPENDENT,
                ),
            ),
            (
                load_partition,
                (
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
                    BOXES,
                    STAGES,
                    GATED,
                    ADD,
                    PERSISTENT,
                    DEPENDENT,
                ),
            ),
        ],
        [1],
        [LOAD_REGISTERS],
    )


def launch_hopper(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    gated: bool,
    eps: float,
    x_squares: Tensor | None,
    out: Tensor,
    out_squares: Tensor | None,
) -> None:
    """out = the product, or with ``out_squares`` out += the product. Arguments as for `launch_tma`.

    Raises:
        ValueError: an operand of another type, width or alignment; not a Hopper GPU, or a Triton before 3.6.
    """
    width = out.shape[-1]
    results = out.view(-1, width)
    whole = tile.split_k == 1
    tile_width = tile.block_n // 2 if gated and whole else tile.block_n
    if not on_hopper():
        raise ValueError(f"{tile} needs a GPU of compute capability 9.0 and Triton 3.6 or later")
    if rows.element_size() != 2 or width % 8:
        raise ValueError(f"{tile} wants 16-bit types and columns of the result in eights, got {rows.dtype} and {width}")
    check_tma(tile, x=rows, weight=weight, out=results)
    m, (n, k) = rows.shape[0], weight.shape
    stride = weight.stride(0)
    layout = gl.NVMMASharedLayout(2 * BOX_COLUMNS, 16, 2)
    swizzled = 2 * min(tile_width, BOX_COLUMNS)  # bytes
    if gated and whole:
        weight_tiles = TensorDescriptor(
            weight,
            [n // 16, 2, 8, k],
            [8 * stride, width * stride, stride, 1],
            [tile.block_n // 16, 2, 8, BOX_COLUMNS],
            gl.NVMMASharedLayout(2 * BOX_COLUMNS, 16, 4),
        )
    else:
        weight_tiles = TensorDescriptor(weight, [n, k], [stride, 1], [tile.block_n, BOX_COLUMNS], layout)
    parts = 1 if x_squares is None else x_squares.shape[0]
    sums = out if whole else torch.empty((tile.split_k, m, n), dtype=torch.float32, device=rows.device)
    grid = (cdiv(m, tile.block_m), cdiv(width if whole else n, tile_width), tile.split_k)
    programs = multiprocessors(rows.device)
    alone = tile.num_warps == 8  # on its multiprocessor
    persistent = gated and whole and alone and grid[0] * grid[1] >= _MANY * programs
    _hopper_linear_kernel[(programs,) if persistent else grid](
        TensorDescriptor(rows, [m, k], [rows.stride(0), 1], [tile.block_m, BOX_COLUMNS], layout),
        weight_tiles,
        TensorDescriptor(
            results, [m, width], [width, 1], [tile.block_m, tile_width], gl.NVMMASharedLayout(swizzled, 16, 2)
        ),
        sums,
        weight if bias is None else bias,
        out if x_squares is None else x_squares,
        out if out_squares is None else out_squares,
        m,
        n,
        k,
        parts,
        eps,
        grid[0] * grid[1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BOXES=tile.block_k // BOX_COLUMNS,
        STAGES=tile.num_stages,
        SPLIT_K=tile.split_k,
        GATED=gated and whole,
        HAS_BIAS=bias is not None and whole,
        NORMS=x_squares is not None,
        BLOCK_PARTS=next_power_of_2(parts),
        ADD=out_squares is not None and whole,
        LEAVES=out_squares is not None and whole and len(out_squares) > 0,
        PERSISTENT=persistent,
        LOAD_REGISTERS=_LOAD_REGISTERS,
        num_warps=tile.num_warps,
        maxnreg=_REGISTERS[tile.num_warps],
        **dependent_launch.options(),
    )
    if not whole:
        reduce_splits(sums, bias, out, gated=gated, squares=out_squares)
