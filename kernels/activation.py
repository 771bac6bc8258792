"""The gated activation of the MLP (SwiGLU; Shazeer 2020, https://arxiv.org/abs/2002.05202).

    silu_and_mul(x) = silu(x[..., :I]) * x[..., I:],  silu(z) = z / (1 + exp(-z))

x: [..., 2 * I] float32, float16 or bfloat16 (gate and up side by side, as one fused projection writes them) -> [...,
I]. Computed in float32 and rounded once. Padded rows are ordinary rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import check_floating, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import release, wait


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """The formula in plain torch."""
    gate, up = x.float().chunk(2, -1)  # [..., I] each
    return F.silu(gate).mul_(up).to(x.dtype)


@triton.jit
def _silu_and_mul_kernel(
    x_ptr,  # [num_rows, 2 * INTERMEDIATE]
    out_ptr,  # [num_rows, INTERMEDIATE] contiguous
    x_stride_row,
    INTERMEDIATE: tl.constexpr,
    BLOCK: tl.constexpr,
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
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * INTERMEDIATE + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_silu_and_mul(x: Tensor) -> Tensor:
    intermediate = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], intermediate), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, 2 * intermediate)
    block = min(next_power_of_2(intermediate), 1024)
    _silu_and_mul_kernel[(rows.shape[0], -(-intermediate // block))](
        rows,
        out,
        rows.stride(0),
        INTERMEDIATE=intermediate,
        BLOCK=block,
        num_warps=4,
        **dependent_launch.options(),
    )
    return out


def _silu_and_mul_cpu(x: Tensor) -> Tensor:
    return silu_and_mul_reference(x).contiguous()


def _silu_and_mul_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_silu_and_mul_op = register_op("silu_and_mul", _silu_and_mul_fake, cpu=_silu_and_mul_cpu, cuda=_launch_silu_and_mul)


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
