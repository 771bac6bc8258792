"""Adds the sums of programs that shared the columns of a matrix product, in order, with what follows the product."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.linear_plan import REDUCED_COLUMNS


@triton.jit(do_not_specialize=["m"])
def _reduce_kernel(
    sums_ptr,  # [SPLIT_K, m, n] float32 contiguous
    bias_ptr,  # [n]
    out_ptr,  # [m, n] or [m, n / 2] contiguous
    squares_ptr,  # with LEAVES [programs along n, m] float32: squares of what out holds then, summed over a program's
    m,
    n,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    LEAVES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = n
    if GATED:
        width = n // 2
    mask = cols < width
    source = sums_ptr + row * n + cols
    step = m.to(tl.int64) * n
    total = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    wait(DEPENDENT)
    for split in tl.static_range(SPLIT_K):
        total += tl.load(source + split * step, mask=mask, other=0.0)
        if GATED:
            up += tl.load(source + split * step + width, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + width + cols, mask=mask, other=0.0).to(tl.float32)
        total = total / (1.0 + tl.exp(-total)) * up
    target = out_ptr + row * width + cols
    if ADD:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(target, total, mask=mask)
    if LEAVES:
        kept = tl.where(mask, total.to(tl.float32), 0.0)
        tl.store(squares_ptr + tl.program_id(0).to(tl.int64) * m + row, tl.sum(kept * kept, axis=0))


def reduce_splits(sums: Tensor, bias: Tensor | None, out: Tensor, *, gated: bool, squares: Tensor | None) -> None:
    """out = sums.sum(0) + bias, gated or not; with ``squares`` it is added to what out holds.

    Args:
        sums: [split_k, m, n] float32, contiguous.
        bias: [n] or None.
        out: [m, n] contiguous, or [m, n / 2] with the gate; changed.
        gated: Whether to take silu(gate) * up of the two halves of n.
        squares: [n / REDUCED_COLUMNS, m] float32, rounded up, or None; gets the sums of squares of what out holds then.
            [0, m]: they are not wanted.
    """
    split_k, m, n = sums.shape
    _reduce_kernel[(cdiv(n // 2 if gated else n, REDUCED_COLUMNS), m)](
        sums,
        sums if bias is None else bias,  # not read without one
        out,
        sums if squares is None else squares,
        m,
        n,
        SPLIT_K=split_k,
        BLOCK=REDUCED_COLUMNS,
        GATED=gated,
        HAS_BIAS=bias is not None,
        ADD=squares is not None,
        LEAVES=squares is not None and len(squares) > 0,
        num_warps=2,
        **dependent_launch.options(),
    )
