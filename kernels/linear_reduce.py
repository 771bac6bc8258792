"""Adds the sums of programs that shared the columns of a matrix product, in order, with what follows the product."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv
from mini_infer.kernels.dependent_launch import release, wait

_BLOCK = 256  # outputs of a program


@triton.jit(do_not_specialize=["m"])
def _reduce_kernel(
    sums_ptr,  # [SPLIT_K, m, n] float32 contiguous
    bias_ptr,  # [n]
    out_ptr,  # [m, n] or [m, n / 2] contiguous
    m,
    n,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
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
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


def reduce_splits(sums: Tensor, bias: Tensor | None, out: Tensor, *, gated: bool, add: bool) -> None:
    """out = sums.sum(0) + bias, gated or not; with ``add`` it is added to what out holds.

    Args:
        sums: [split_k, m, n] float32, contiguous.
        bias: [n] or None.
        out: [m, n] contiguous, or [m, n / 2] with the gate; changed.
        gated: Whether to take silu(gate) * up of the two halves of n.
        add: Whether to add.
    """
    split_k, m, n = sums.shape
    _reduce_kernel[(cdiv(n // 2 if gated else n, _BLOCK), m)](
        sums,
        sums if bias is None else bias,  # not read without one
        out,
        m,
        n,
        SPLIT_K=split_k,
        BLOCK=_BLOCK,
        GATED=gated,
        HAS_BIAS=bias is not None,
        ADD=add,
        num_warps=2,
        **dependent_launch.options(),
    )
