"""The gated activation of the MLP (SwiGLU; Shazeer 2020, https://arxiv.org/abs/2002.05202).

    silu_and_mul(x)         = silu(x[..., :I]) * x[..., I:],  silu(z) = z / (1 + exp(-z))
    normed_silu_and_mul(x)  = silu_and_mul(x / rms), with a root mean square for each row

x: [..., 2 * I] float32, float16 or bfloat16 (gate and up side by side, as one fused projection writes them) -> [...,
I]. Computed in float32 and rounded once. Padded rows are ordinary rows. The root mean square is that of what was
projected: it stands outside the product, so that the product need not wait for it (`linear`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, check_floating, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.linear_common import inverse_rms


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """The formula in plain torch."""
    gate, up = x.float().chunk(2, -1)  # [..., I] each
    return F.silu(gate).mul_(up).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _silu_and_mul_kernel(
    x_ptr,  # [num_rows, 2 * INTERMEDIATE]
    squares_ptr,  # with NORMS [parts, num_rows] float32
    out_ptr,  # [num_rows, INTERMEDIATE] contiguous
    num_rows,
    x_stride_row,
    parts,
    features,
    eps,
    INTERMEDIATE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < INTERMEDIATE
    source = x_ptr + row * x_stride_row + cols
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
    if NORMS:
        part = tl.arange(0, BLOCK_PARTS)
        squares = tl.load(squares_ptr + part * num_rows + row, mask=part < parts, other=0.0)
        inv_rms = inverse_rms(tl.sum(squares, axis=0), features, eps)
        gate *= inv_rms
        up *= inv_rms
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * INTERMEDIATE + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_silu_and_mul(x: Tensor) -> Tensor:
    return _launch(x, None, 1, 0.0)


def _launch_normed_silu_and_mul(x: Tensor, squares: Tensor, features: int, eps: float) -> Tensor:
    return _launch(x, squares, features, eps)


def _launch(x: Tensor, squares: Tensor | None, features: int, eps: float) -> Tensor:
    intermediate = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], intermediate), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, 2 * intermediate)
    block = min(next_power_of_2(intermediate), 1024)
    parts = 1 if squares is None else squares.shape[0]
    _silu_and_mul_kernel[(rows.shape[0], cdiv(intermediate, block))](
        rows,
        rows if squares is None else squares,
        out,
        rows.shape[0],
        rows.stride(0),
        parts,
        features,
        eps,
        INTERMEDIATE=intermediate,
        BLOCK=block,
        NORMS=squares is not None,
        BLOCK_PARTS=next_power_of_2(parts),
        num_warps=4,
        **dependent_launch.options(),
    )
    return out


def _silu_and_mul_cpu(x: Tensor) -> Tensor:
    return silu_and_mul_reference(x).contiguous()


def _normed_silu_and_mul_cpu(x: Tensor, squares: Tensor, features: int, eps: float) -> Tensor:
    inv_rms = squares.sum(0).div(features).add(eps).rsqrt().view(*x.shape[:-1], 1)
    return silu_and_mul_reference(x.float() * inv_rms).to(x.dtype)


def _normed_silu_and_mul_fake(x: Tensor, squares: Tensor, features: int, eps: float) -> Tensor:
    return _silu_and_mul_fake(x)


def _silu_and_mul_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_silu_and_mul_op = register_op("silu_and_mul", _silu_and_mul_fake, cpu=_silu_and_mul_cpu, cuda=_launch_silu_and_mul)


_normed_silu_and_mul_op = register_op(
    "normed_silu_and_mul",
    _normed_silu_and_mul_fake,
    cpu=_normed_silu_and_mul_cpu,
    cuda=_launch_normed_silu_and_mul,
)


def silu_and_mul(x: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension times the second half.

    Args:
        x: [..., 2 * intermediate].

    Returns:
        [..., intermediate], contiguous, dtype of x.
    """
    check_floating("x", x)
    if x.dim() < 1 or x.shape[-1] % 2 != 0:
        raise ValueError(f"x must have an even last dimension (gate and up side by side), got {tuple(x.shape)}")
    out: Tensor = _silu_and_mul_op(x)
    return out


def normed_silu_and_mul(x: Tensor, squares: Tensor, features: int, eps: float) -> Tensor:
    """`silu_and_mul` of x divided, row by row, by the root mean square of what x was projected from.

    Args:
        x: [..., 2 * intermediate].
        squares: [parts, rows] float32, contiguous: parts of the sums of squares of the rows that were projected.
        features: How many squares a sum has.
        eps: Added to their mean.

    Returns:
        [..., intermediate], contiguous, dtype of x.
    """
    check_floating("x", x)
    rows = x.shape[:-1].numel()
    if x.dim() < 1 or x.shape[-1] % 2 != 0:
        raise ValueError(f"x must have an even last dimension (gate and up side by side), got {tuple(x.shape)}")
    if squares.dtype != torch.float32 or squares.shape[1:] != (rows,) or not squares.is_contiguous():
        raise ValueError(f"squares must be float32 [parts, {rows}], got {squares.dtype} {tuple(squares.shape)}")
    out: Tensor = _normed_silu_and_mul_op(x, squares, features, eps)
    return out
