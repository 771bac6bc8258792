"""The matrix product with 1 to 4 rows, in registers: `gemv` tiles of `skinny_linear`.

A program owns `block_n` rows of the weight and multiplies in registers, all columns in flight at once where they fit,
and may norm x for itself (`linear_common`). It fetches its first weights while the kernel before it still runs
(`dependent_launch`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, next_power_of_2
from mini_infer.kernels.dependent_launch import prefetch, release, wait
from mini_infer.kernels.linear_common import LINE, inverse_rms, silu_mul, weight_rows
from mini_infer.kernels.linear_plan import Tile


@triton.jit
def _store_row(
    total,  # [BLOCK_N] float32
    row,
    rows,
    bias_ptr,
    out_ptr,
    m,
    n,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows).to(tl.float32)
    total = total[None, :]  # [1, BLOCK_N]
    if GATED:
        total = silu_mul(total, 1, BLOCK_N)
        width = n // 2
        cols = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        width = n
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = (out_ptr + row * width + cols)[None, :]  # int32: at most 4 rows
    mask = ((cols < width) & (row < m))[None, :]
    if ADD:
        total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_x(x_ptr, row, m, x_stride, cols, k, EVEN_K: tl.constexpr):
    """Row `row` of x, [1, BLOCK_K] float32. Past the last row that one again: its result is not stored."""
    source = x_ptr + tl.minimum(row, m - 1).to(tl.int64) * x_stride + cols
    x = tl.load(source) if EVEN_K else tl.load(source, mask=cols < k, other=0.0)
    return x.to(tl.float32)[None, :]


@triton.jit
def _normed(total, squares, k, eps, NORMS: tl.constexpr):
    """The products [BLOCK_N] of a row of x, divided by its root mean square; squares: parts of the sum of its own."""
    if NORMS:
        total *= inverse_rms(tl.sum(squares), k, eps)
    return total


@triton.jit
def _add_row(total, squares, w, x_ptr, row, m, x_stride, cols, k, EVEN_K: tl.constexpr, NORMS: tl.constexpr):
    """The products of some columns with a row of x added to those before, and its squares to theirs."""
    x = _load_x(x_ptr, row, m, x_stride, cols, k, EVEN_K)
    if NORMS:
        squares += x * x
    return total + w * x, squares


@triton.jit(do_not_specialize=["m"])
def _gemv_kernel(
    x_ptr,  # [m, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n]
    out_ptr,  # [m, n] or [m, n / 2] contiguous
    m,
    n,
    k,
    eps,
    x_stride,
    weight_stride,
    M_PAD: tl.constexpr,  # 1, 2 or 4
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMS: tl.constexpr,
    ADD: tl.constexpr,  # to what out holds
    ONE_TILE: tl.constexpr,  # BLOCK_K >= k
    EVEN_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    rows = weight_rows(n, BLOCK_N, GATED)
    offsets = tl.arange(0, BLOCK_K)
    source = weight_ptr + rows[:, None] * weight_stride
    if ONE_TILE:
        if EVEN_K:
            w = tl.load(source + offsets[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(
                source + offsets[None, :], mask=(offsets < k)[None, :], other=0.0, eviction_policy="evict_first"
            )
        wait(DEPENDENT)
        w = w.to(tl.float32)
        for row in tl.static_range(M_PAD):
            x = _load_x(x_ptr, row, m, x_stride, offsets, k, EVEN_K)
            total = _normed(tl.sum(w * x, 1), x * x, k, eps, NORMS)
            _store_row(total, row, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
    else:
        if DEPENDENT:
            prefetch(source + tl.minimum(tl.arange(0, max(BLOCK_K // LINE, 1)) * LINE, k - 1)[None, :])
        wait(DEPENDENT)
        sum0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        sum1 = sum0
        sum2 = sum0
        sum3 = sum0
        squares0 = tl.zeros([1, BLOCK_K], tl.float32)
        squares1 = squares0
        squares2 = squares0
        squares3 = squares0
        for start in tl.range(0, k, BLOCK_K, num_stages=NUM_STAGES):
            cols = start + offsets
            if EVEN_K:
                w = tl.load(source + cols[None, :], eviction_policy="evict_first")
            else:
                w = tl.load(source + cols[None, :], mask=(cols < k)[None, :], other=0.0)
            w = w.to(tl.float32)
            sum0, squares0 = _add_row(sum0, squares0, w, x_ptr, 0, m, x_stride, cols, k, EVEN_K, NORMS)
            if M_PAD > 1:
                sum1, squares1 = _add_row(sum1, squares1, w, x_ptr, 1, m, x_stride, cols, k, EVEN_K, NORMS)
            if M_PAD > 2:
                sum2, squares2 = _add_row(sum2, squares2, w, x_ptr, 2, m, x_stride, cols, k, EVEN_K, NORMS)
                sum3, squares3 = _add_row(sum3, squares3, w, x_ptr, 3, m, x_stride, cols, k, EVEN_K, NORMS)
        total = _normed(tl.sum(sum0, 1), squares0, k, eps, NORMS)
        _store_row(total, 0, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
        if M_PAD > 1:
            total = _normed(tl.sum(sum1, 1), squares1, k, eps, NORMS)
            _store_row(total, 1, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
        if M_PAD > 2:
            total = _normed(tl.sum(sum2, 1), squares2, k, eps, NORMS)
            _store_row(total, 2, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
            total = _normed(tl.sum(sum3, 1), squares3, k, eps, NORMS)
            _store_row(total, 3, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)


def launch_gemv(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    gated: bool,
    eps: float,
    out: Tensor,
    add: bool,
) -> None:
    m, (n, k) = rows.shape[0], weight.shape
    _gemv_kernel[(cdiv(n, tile.block_n),)](
        rows,
        weight,
        weight if bias is None else bias,
        out,
        m,
        n,
        k,
        eps,
        rows.stride(0),
        weight.stride(0),
        M_PAD=next_power_of_2(m),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        NUM_STAGES=tile.num_stages,
        GATED=gated,
        HAS_BIAS=bias is not None,
        NORMS=tile.norms,
        ADD=add,
        ONE_TILE=tile.block_k >= k,
        EVEN_K=k % tile.block_k == 0,
        num_warps=tile.num_warps,
        **dependent_launch.options(),
    )
