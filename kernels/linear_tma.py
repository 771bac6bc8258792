"""The matrix product in tiles that the tensor memory accelerator fetches, on GPUs from Hopper on.

    product              = x @ weight.T + bias
    gated                = silu(g) * u,  [g, u] = x @ weight.T + bias
    with a residual      : r += x @ weight.T + bias

x: [m, k], weight: [n, k], bias: [n] or None, r: [m, n]; float16 or bfloat16 (float32 works, without tensor cores),
starts and rows aligned to 16 bytes -> [m, n], or [m, n / 2] with the gate. Sums are float32, in an order that the tile
fixes.

A program computes weight_tile @ x_tile.T, so that the weight's rows fill the 64 rows that a tensor core instruction
wants at least, and x's may be as few as 16. Both operands go from memory to shared memory to the tensor cores without
passing through registers; tiles that reach past the end are filled with zeros by the hardware. Programs that share
weight rows run side by side, so that the weight is read from memory once. Before the kernel ahead is done, a program
brings its first weights into the L2 cache (`dependent_launch`). With `split_k` > 1 several programs share the columns,
and `reduce_splits` adds their sums. A tile that norms divides by the root mean square of squares that were left by
whoever made x: it cannot look at x itself, which goes from shared memory to the tensor cores while the program goes on.
Triton (3.6) keeps one buffer too few for an x that is read into registers as well, and writes the next one over it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import INTERPRET, cdiv, next_power_of_2
from mini_infer.kernels.dependent_launch import prefetch, release, wait
from mini_infer.kernels.linear_common import (
    LINE,
    check_tma,
    inverse_rms,
    prefetched_columns,
    row_squares,
    split_columns,
)
from mini_infer.kernels.linear_plan import Tile
from mini_infer.kernels.linear_reduce import reduce_splits


@triton.jit(do_not_specialize=["m"])
def _tma_kernel(
    x_tiles,  # [m, k] in tiles [BLOCK_M, BLOCK_K]
    weight_tiles,  # [n, k] in tiles [BLOCK_N, BLOCK_K], with the gate [BLOCK_N / 2, BLOCK_K]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n]
    out_ptr,  # [m, n] or [m, n / 2]; with SPLIT_K > 1 the sums [SPLIT_K, m, n] float32; contiguous
    x_squares_ptr,  # with NORMS [parts, m] float32: parts of the sums of the squares of x
    out_squares_ptr,  # with LEAVES [programs along n, m] float32: likewise of what out holds then
    m,
    n,
    k,
    weight_stride,
    parts,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMS: tl.constexpr,  # needs SPLIT_K == 1
    BLOCK_PARTS: tl.constexpr,
    ADD: tl.constexpr,  # to what out holds
    LEAVES: tl.constexpr,
    UPCAST: tl.constexpr,
    PREFETCHED: tl.constexpr,  # columns, a power of two
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    width = n // 2 if GATED else n
    first_row = tl.program_id(0) * BLOCK_M
    first_col = tl.program_id(1) * WIDTH
    cols = first_col + tl.arange(0, WIDTH)
    first, last = split_columns(tl.program_id(2), k, BLOCK_K, SPLIT_K)
    if DEPENDENT:
        lines = tl.minimum(first + tl.arange(0, PREFETCHED // LINE) * LINE, k - 1)[None, :]
        fetched = weight_ptr + tl.minimum(cols, width - 1).to(tl.int64)[:, None] * weight_stride + lines
        prefetch(fetched)
        if GATED:
            prefetch(fetched + width.to(tl.int64) * weight_stride)
    wait(DEPENDENT)
    rows = first_row + tl.arange(0, BLOCK_M)
    out_rows = rows.to(tl.int64)
    if SPLIT_K > 1:
        out_rows += tl.program_id(2).to(tl.int64) * m
    target = out_ptr + out_rows[:, None] * width + cols[None, :]  # [BLOCK_M, WIDTH]
    mask = (rows < m)[:, None] & (cols < width)[None, :]
    if ADD:  # fetched while the product is computed, and so are the squares
        before = tl.load(target, mask=mask, other=0.0)
    if NORMS:
        part = tl.arange(0, BLOCK_PARTS)[:, None]
        known = (part < parts) & (rows < m)[None, :]
        squares = tl.load(x_squares_ptr + part * m + rows[None, :], mask=known, other=0.0)  # [BLOCK_PARTS, BLOCK_M]
    acc = tl.zeros([WIDTH, BLOCK_M], tl.float32)
    up_acc = acc
    for start in range(first, last, BLOCK_K):
        x = x_tiles.load([first_row, start])
        w = weight_tiles.load([first_col, start])
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        if GATED:
            up = weight_tiles.load([width + first_col, start])
            if UPCAST:
                up = up.to(tl.float32)
            up_acc = tl.dot(up, tl.trans(x), up_acc, input_precision="ieee")
    if NORMS:
        inv_rms = inverse_rms(tl.sum(squares, axis=0), k, eps)[None, :]  # [1, BLOCK_M]
        acc *= inv_rms
        if GATED:
            up_acc *= inv_rms
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            up_acc += tl.load(bias_ptr + width + cols, mask=cols < width, other=0.0).to(tl.float32)[:, None]
        acc = acc / (1.0 + tl.exp(-acc)) * up_acc
    out = tl.trans(acc)  # [BLOCK_M, WIDTH]
    if ADD:
        out += before.to(tl.float32)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(target, out, mask=mask)
    if LEAVES:
        tl.store(out_squares_ptr + tl.program_id(1) * m + rows, row_squares(out, mask), mask=rows < m)


def launch_tma(
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
    """out = the product, or with ``out_squares`` out += the product. Shapes as in the module's description.

    Args:
        rows: x.
        weight, bias: Of the projection.
        tile: How to cut it up.
        gated: Whether to take silu(g) * u.
        eps: Added to the mean of squares.
        x_squares: [parts, m] float32, parts of the sums of the squares of x; for a tile that norms.
        out: Changed.
        out_squares: [n / block_n, m] float32, rounded up; gets parts of the sums of the squares of out. [0, m]: they
            are not wanted.

    Raises:
        ValueError: an operand that is not aligned.
    """
    check_tma(tile, x=rows, weight=weight)
    m, (n, k), split_k = rows.shape[0], weight.shape, tile.split_k
    whole = split_k == 1
    width = tile.block_n // 2 if gated and whole else tile.block_n
    target = out if whole else torch.empty((split_k, m, n), dtype=torch.float32, device=rows.device)
    parts = 1 if x_squares is None else x_squares.shape[0]
    _tma_kernel[(cdiv(m, tile.block_m), cdiv(n, tile.block_n), split_k)](
        TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [tile.block_m, tile.block_k]),
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [width, tile.block_k]),
        weight,
        weight if bias is None else bias,
        target,
        target if x_squares is None else x_squares,
        target if out_squares is None else out_squares,
        m,
        n,
        k,
        weight.stride(0),
        parts,
        eps,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=split_k,
        GATED=gated and whole,
        HAS_BIAS=bias is not None and whole,
        NORMS=tile.norms,
        BLOCK_PARTS=next_power_of_2(parts),
        ADD=out_squares is not None and whole,
        LEAVES=out_squares is not None and whole and len(out_squares) > 0,
        UPCAST=INTERPRET,
        PREFETCHED=prefetched_columns(cdiv(k, split_k)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch.options(),
    )
    if not whole:
        reduce_splits(target, bias, out, gated=gated, squares=out_squares)
