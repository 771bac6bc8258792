"""The matrix product with 1 to 4 rows, in registers: `gemv` tiles of `skinny_linear`.

A program owns `block_n` rows of the weight and multiplies in registers, all columns in flight at once where they fit,
and may norm x for itself. It fetches its first weights while the kernel before it still runs (`dependent_launch`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, next_power_of_2
from mini_infer.kernels.dependent_launch import prefetch, release, wait
from mini_infer.kernels.linear_common import LINE, silu_mul, weight_rows
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


@triton.jit(do_not_specialize=["m"])
def _gemv_kernel(
    x_ptr,  # [m, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n]
    norm_ptr,  # [k]; unread unless HAS_NORM
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
    HAS_NORM: tl.constexpr,  # needs ONE_TILE
    ADD: tl.constexpr,  # to what out holds
    ONE_TILE: tl.constexpr,  # BLOCK_K >= k
    EVEN_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
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
        if HAS_NORM:
            norm = tl.load(norm_ptr + offsets, mask=offsets < k, other=0.0).to(tl.float32)[None, :]
        wait(DEPENDENT)
        w = w.to(tl.float32)
        for row in tl.static_range(M_PAD):
            x = _load_x(x_ptr, row, m, x_stride, offsets, k, EVEN_K)
            if HAS_NORM:  # with the roundings of `rmsnorm`
                inv_rms = 1.0 / tl.sqrt_rn(tl.sum(x * x) / k + tl.cast(eps, tl.float32))
                x = ((x * inv_rms).to(dtype).to(tl.float32) * norm).to(dtype).to(tl.float32)
            _store_row(tl.sum(w * x, 1), row, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
    else:
        if DEPENDENT:
            prefetch(source + tl.minimum(tl.arange(0, max(BLOCK_K // LINE, 1)) * LINE, k - 1)[None, :])
        wait(DEPENDENT)
        sum0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        sum1 = sum0
        sum2 = sum0
        sum3 = sum0
        for start in tl.range(0, k, BLOCK_K, num_stages=NUM_STAGES):
            cols = start + offsets
            if EVEN_K:
                w = tl.load(source + cols[None, :], eviction_policy="evict_first")
            else:
                w = tl.load(source + cols[None, :], mask=(cols < k)[None, :], other=0.0)
            w = w.to(tl.float32)
            sum0 += w * _load_x(x_ptr, 0, m, x_stride, cols, k, EVEN_K)
            if M_PAD > 1:
                sum1 += w * _load_x(x_ptr, 1, m, x_stride, cols, k, EVEN_K)
            if M_PAD > 2:
                sum2 += w * _load_x(x_ptr, 2, m, x_stride, cols, k, EVEN_K)
                sum3 += w * _load_x(x_ptr, 3, m, x_stride, cols, k, EVEN_K)
        _store_row(tl.sum(sum0, 1), 0, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
        if M_PAD > 1:
            _store_row(tl.sum(sum1, 1), 1, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
        if M_PAD > 2:
            _store_row(tl.sum(sum2, 1), 2, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)
            _store_row(tl.sum(sum3, 1), 3, rows, bias_ptr, out_ptr, m, n, BLOCK_N, GATED, HAS_BIAS, ADD)


def launch_gemv(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    gated: bool,
    norm: Tensor | None,
    eps: float,
    out: Tensor,
    add: bool,
) -> None:
    m, (n, k) = rows.shape[0], weight.shape
    _gemv_kernel[(cdiv(n, tile.block_n),)](
        rows,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm,
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
        HAS_NORM=norm is not None,
        ADD=add,
        ONE_TILE=tile.block_k >= k,
        EVEN_K=k % tile.block_k == 0,
        num_warps=tile.num_warps,
        **dependent_launch.options(),
    )
