"""RMSNorm, alone and fused with the residual add (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467).

    rmsnorm(x)        = cast(x / sqrt(mean(x ** 2) + eps)) * weight, without the last factor if there is no weight
    add_rmsnorm(x, r) = rmsnorm(x + r), x + r

x, residual: [..., hidden], last dimension dense, float32, float16 or bfloat16; weight: [hidden] in the same dtype. The
statistics are taken in float32; as in Hugging Face Llama the normalised value is cast back to the dtype before the
multiplication. Rows are independent, each reduced in one fixed order; padded rows are ordinary rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, check_floating, check_same, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.relaunch import Launches


def rmsnorm_reference(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMSNorm in plain torch."""
    x32 = x.float()
    inv_rms = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [..., 1]
    normed = (x32 * inv_rms).to(x.dtype)
    return normed if weight is None else normed.mul_(weight)


def add_rmsnorm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Residual add, then RMSNorm, in plain torch."""
    new_residual = (x + residual).contiguous()
    return rmsnorm_reference(new_residual, weight, eps), new_residual


@triton.jit(do_not_specialize=["eps", "num_rows"])
def _rmsnorm_kernel(
    x_ptr,  # [num_rows, hidden], row r at (r // inner) * stride_outer + (r % inner) * stride_inner
    residual_ptr,  # same shape and strides of its own, or None
    weight_ptr,  # [hidden], or None
    out_ptr,  # [num_rows, hidden] contiguous
    new_residual_ptr,  # [num_rows, hidden] contiguous; None without a residual
    eps,
    num_rows,
    inner,
    x_stride_outer,
    x_stride_inner,
    r_stride_outer,
    r_stride_inner,
    HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    cols = tl.arange(0, BLOCK_HIDDEN)  # [BLOCK_HIDDEN]
    mask = (rows < num_rows)[:, None] & (cols < HIDDEN)[None, :]
    outer_index = rows // inner
    inner_index = rows % inner
    x_rows = outer_index * x_stride_outer + inner_index * x_stride_inner
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=cols < HIDDEN, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    x = tl.load(x_ptr + x_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    out_offsets = rows[:, None] * HIDDEN + cols[None, :]
    if residual_ptr is not None:
        r_rows = outer_index * r_stride_outer + inner_index * r_stride_inner
        x += tl.load(residual_ptr + r_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(new_residual_ptr.dtype.element_ty)
        tl.store(new_residual_ptr + out_offsets, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / HIDDEN  # [BLOCK_ROWS]
    inv_rms = 1.0 / tl.sqrt_rn(mean_square + tl.cast(eps, tl.float32))
    normed = (x * inv_rms[:, None]).to(out_ptr.dtype.element_ty)
    if weight_ptr is not None:
        normed = (normed.to(tl.float32) * weight[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offsets, normed, mask=mask)


_launches = Launches(_rmsnorm_kernel)


def _row_strides(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x as rows: (x or a contiguous copy, stride_outer, stride_inner, inner), with row r as in the kernel's comment."""
    strides = x.stride()
    if len(strides) == 2 and strides[1] == 1:
        return x, strides[0], 0, 1
    if len(strides) == 3 and strides[2] == 1:
        return x, strides[0], strides[1], x.shape[1]
    return x.contiguous(), x.shape[-1], 0, 1


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    hidden = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_residual = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    num_rows = x.numel() // hidden
    if num_rows == 0:
        return out, new_residual
    rows, x_outer, x_inner, inner = _row_strides(x)
    r, r_outer, r_inner = None, 0, 0
    if residual is not None:
        r, r_outer, r_inner, r_inner_count = _row_strides(residual)
        if r_inner_count != inner:  # one of the two had to be copied: bring both to plain rows
            rows, x_outer, x_inner, inner = rows.contiguous(), hidden, 0, 1
            r, r_outer, r_inner = r.contiguous(), hidden, 0
    block_hidden = next_power_of_2(hidden)
    block_rows = max(1, 1024 // block_hidden)  # short rows (q/k norm) share a program
    _launches.first(
        (x, residual, weight),
        (rows, r, None if weight is None else weight.contiguous()),
        (out, new_residual),
        (eps,),
        (
            *(num_rows, inner, x_outer, x_inner, r_outer, r_inner),
            *(hidden, block_rows, block_hidden, dependent_launch.supported()),
        ),
        grid=(cdiv(num_rows, block_rows), 1, 1),
        num_warps=min(max(block_hidden // 256, 4), 16),
        launch_pdl=dependent_launch.supported(),
    )
    return out, new_residual


def _launch_rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out, _ = _launches.again((x, None, weight), eps) or _launch(x, None, weight, eps)
    return out


def _launch_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, new_residual = _launches.again((x, residual, weight), eps) or _launch(x, residual, weight, eps)
    assert new_residual is not None
    return normed, new_residual


def _rmsnorm_cpu(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return rmsnorm_reference(x, weight, eps).contiguous()


def _rmsnorm_fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _add_rmsnorm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_rmsnorm_op = register_op("rmsnorm", _rmsnorm_fake, cpu=_rmsnorm_cpu, cuda=_launch_rmsnorm)
_add_rmsnorm_op = register_op("add_rmsnorm", _add_rmsnorm_fake, cpu=add_rmsnorm_reference, cuda=_launch_add_rmsnorm)


def _check(x: Tensor, weight: Tensor | None) -> None:
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x must be [..., hidden], got a scalar")
    if weight is None:
        return
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight must be [{x.shape[-1]}] (x's last dimension), got {tuple(weight.shape)}")
    check_same("weight", weight, "x", x)


def rmsnorm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x: [..., hidden]; a strided view such as the q heads of a fused qkv row is read in place.
        weight: [hidden], dtype of x; None for one of ones.
        eps: Added to the mean square.

    Returns:
        A contiguous tensor of x's shape and dtype.
    """
    outputs = _launches.again((x, None, weight), eps)
    if outputs is None:
        _check(x, weight)
        outputs = [_rmsnorm_op(x, weight, eps)]
    out: Tensor = outputs[0]
    return out


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Add the residual and normalise the sum. Nothing is changed in place.

    Args:
        x: [..., hidden].
        residual: Shape, dtype and device of x.
        weight: [hidden], dtype of x.
        eps: Added to the mean square.

    Returns:
        (normed, new_residual), both contiguous and of x's shape and dtype; new_residual = x + residual.
    """
    outputs = _launches.again((x, residual, weight), eps)
    if outputs is not None:
        return outputs[0], outputs[1]
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_same("residual", residual, "x", x)
    normed, new_residual = _add_rmsnorm_op(x, residual, weight, eps)
    return normed, new_residual
