"""The matrix product with up to 64 rows on tensor cores, through registers: `dot` tiles of `skinny_linear`.

x is padded to 16, 32 or 64 rows for the tensor cores, which idle most of the time; a program owns `block_n` weight rows
and pipelines over the columns, or has them all in flight at once where they fit; it may norm x for itself, from the
squares of what passes through (`linear_common`). With `split_k` > 1 several programs share the columns, and
`reduce_splits` adds their sums. A program fetches its first weights while the kernel before it still runs
(`dependent_launch`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import INTERPRET, cdiv, next_power_of_2
from mini_infer.kernels.dependent_launch import prefetch, release, wait
from mini_infer.kernels.linear_common import (
    LINE,
    inverse_rms,
    partial_squares,
    prefetched_columns,
    row_squares,
    silu_mul,
    split_columns,
    weight_rows,
)
from mini_infer.kernels.linear_plan import Tile
from mini_infer.kernels.linear_reduce import reduce_splits


@triton.jit(do_not_specialize=["m"])
def _dot_kernel(
    x_ptr,  # [m, k]
    weight_ptr,  # [n, k]
    bias_ptr,  # [n]
    out_ptr,  # [m, n] or [m, n / 2]; with SPLIT_K > 1 the sums [SPLIT_K, m, n] float32; contiguous
    squares_ptr,  # with LEAVES [programs along n, m] float32: squares of what out holds then, summed over a program's
    m,
    n,
    k,
    x_stride,
    weight_stride,
    eps,
    M_PAD: tl.constexpr,  # 16, 32 or 64
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMS: tl.constexpr,  # needs SPLIT_K == 1
    ADD: tl.constexpr,  # to what out holds
    LEAVES: tl.constexpr,
    ONE_TILE: tl.constexpr,  # BLOCK_K takes all of a program's columns
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PREFETCHED: tl.constexpr,  # columns, a power of two; unused if ONE_TILE
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    rows = weight_rows(n, BLOCK_N, GATED)
    x_rows = tl.arange(0, M_PAD)
    offsets = tl.arange(0, BLOCK_K)
    x_source = x_ptr + x_rows.to(tl.int64)[:, None] * x_stride
    w_source = weight_ptr + rows[:, None] * weight_stride
    first, last = split_columns(tl.program_id(1), k, BLOCK_K, SPLIT_K)
    if ONE_TILE:
        cols = first + offsets
        w = tl.load(w_source + cols[None, :], mask=(cols < last)[None, :], other=0.0, eviction_policy="evict_first")
        wait(DEPENDENT)
        x = tl.load(x_source + cols[None, :], mask=(x_rows < m)[:, None] & (cols < last)[None, :], other=0.0)
        if NORMS:
            squares = partial_squares(x, M_PAD, BLOCK_K)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), input_precision="ieee")
    else:
        if DEPENDENT:
            prefetch(w_source + tl.minimum(first + tl.arange(0, PREFETCHED // LINE) * LINE, k - 1)[None, :])
        wait(DEPENDENT)
        acc = tl.zeros([M_PAD, BLOCK_N], tl.float32)
        squares = tl.zeros([M_PAD, BLOCK_K // 8], tl.float32)
        for start in range(first, last, BLOCK_K):
            cols = start + offsets
            # Masked: the padding rows cost no traffic.
            if EVEN_K:
                x = tl.load(x_source + cols[None, :], mask=(x_rows < m)[:, None], other=0.0)
                w = tl.load(w_source + cols[None, :], eviction_policy="evict_first")
            else:
                x = tl.load(x_source + cols[None, :], mask=(x_rows < m)[:, None] & (cols < k)[None, :], other=0.0)
                w = tl.load(w_source + cols[None, :], mask=(cols < k)[None, :], other=0.0)
            if NORMS:
                squares += partial_squares(x, M_PAD, BLOCK_K)
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if NORMS:
        acc *= inverse_rms(tl.sum(squares, axis=1), k, eps)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    if GATED:
        acc = silu_mul(acc, M_PAD, BLOCK_N)
        width = n // 2
        out_cols = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    else:
        width = n
        out_cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_rows = x_rows.to(tl.int64)
    if SPLIT_K > 1:
        out_rows += tl.program_id(1).to(tl.int64) * m
    target = out_ptr + out_rows[:, None] * width + out_cols[None, :]
    mask = (x_rows < m)[:, None] & (out_cols < width)[None, :]
    if ADD:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(target, out, mask=mask)
    if LEAVES:
        tl.store(squares_ptr + tl.program_id(0) * m + x_rows, row_squares(out, mask), mask=x_rows < m)


def launch_dot(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile: Tile,
    gated: bool,
    eps: float,
    out: Tensor,
    squares: Tensor | None,
) -> None:
    m, (n, k), split_k = rows.shape[0], weight.shape, tile.split_k
    whole = split_k == 1
    some_bias = weight if bias is None else bias  # not read without one
    target = out if whole else torch.empty((split_k, m, n), dtype=torch.float32, device=rows.device)
    _dot_kernel[(cdiv(n, tile.block_n), split_k)](
        rows,
        weight,
        some_bias,
        target,
        target if squares is None else squares,
        m,
        n,
        k,
        rows.stride(0),
        weight.stride(0),
        eps,
        M_PAD=max(16, next_power_of_2(m)),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=split_k,
        GATED=gated and whole,
        HAS_BIAS=bias is not None and whole,
        NORMS=tile.norms,
        ADD=squares is not None and whole,
        LEAVES=squares is not None and whole and len(squares) > 0,
        ONE_TILE=tile.block_k * split_k >= k,
        EVEN_K=k % tile.block_k == 0,
        UPCAST=INTERPRET,
        PREFETCHED=prefetched_columns(cdiv(k, split_k)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_launch.options(),
    )
    if not whole:
        reduce_splits(target, bias, out, gated=gated, squares=squares)
