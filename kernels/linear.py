"""The matrix products of a decoder layer, y = x @ weight.T + bias, with the RMSNorm, gate or residual add beside them.

    linear(x)                 = y
    norm_linear(x)            = linear(x / sqrt(mean(x ** 2) + eps))
    norm_linear(x) gated      = silu(g) * u,  [g, u] = norm_linear(x)
    add_linear(residual, x)   : residual += linear(x)

The weight of an RMSNorm ahead of a product is multiplied into the columns of the product's own (`fold_norm`), once.
What is left of the norm is a number for each row, which a kernel may as well apply to what it has summed up: it begins
to multiply without waiting for whole rows, and a layer has two kernels less. Where it cannot look at x for this, the
product that made x leaves the sums of its squares.

On the CPU in float32 `pack_linear` reorders a weight once into oneDNN's blocked layout; the product then runs 2 to 3
times faster than `F.linear` at 1 to 256 rows (measured on two EPYC cores), which is most of a CPU decode step. The
plain weight is dropped, so no memory is spent twice.

On a GPU `with_tiles` attaches to a weight which of the kernels of `skinny_linear` to use for how many rows. The choice
depends on shapes alone, so it is made once, when a step is captured. Everything else is cuBLAS, and a kernel for what
lies beside the product.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_infer.kernels.activation import silu_and_mul
from mini_infer.kernels.common import on_hopper
from mini_infer.kernels.linear_plan import LinearPlan, Role, Tile, Tiles, pick
from mini_infer.kernels.norm import rmsnorm
from mini_infer.kernels.skinny_linear import add_linear_op, norm_linear_op, skinny_linear_op

_PACK_ROWS = 8  # the row count that oneDNN is told to expect; the layout chosen is good at 1 to 256


@dataclass(frozen=True)
class LinearWeight:
    """One projection: exactly one of `weight` ([out_features, in_features]) and `packed` (oneDNN's layout) is set.

    `tiles` holds the choices of kernel on a GPU, for the one role that the weight has in a layer; empty means cuBLAS.
    """

    weight: Tensor | None
    bias: Tensor | None  # [out_features]
    packed: Tensor | None
    out_features: int
    in_features: int
    tiles: Tiles = ()

    @classmethod
    def from_tensors(cls, weight: Tensor, bias: Tensor | None = None) -> "LinearWeight":
        """An unpacked projection from its weight [out_features, in_features] and bias [out_features]."""
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                "weight must be [out_features, in_features] and bias [out_features], "
                f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
            )
        return cls(weight=weight, bias=bias, packed=None, out_features=weight.shape[0], in_features=weight.shape[1])


def can_pack(weight: Tensor) -> bool:
    """Whether this torch can pack this weight: float32, on the CPU, and oneDNN's private ops are there."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linear(weight: LinearWeight) -> LinearWeight:
    """The same projection in the fastest format for its device; `weight` itself where there is nothing to gain."""
    if weight.weight is None or not can_pack(weight.weight):
        return weight
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.weight.detach().contiguous(), _PACK_ROWS)
    return LinearWeight(
        weight=None,
        bias=weight.bias,
        packed=packed,
        out_features=weight.out_features,
        in_features=weight.in_features,
    )


def with_tiles(weight: LinearWeight, plan: LinearPlan, role: Role) -> LinearWeight:
    """The same projection with the plan's choices; `weight` itself where there is no choice (CPU, packed)."""
    plain = weight.weight
    if plain is None or plain.device.type != "cuda" or plain.stride(1) != 1:
        return weight
    size = plain.element_size()
    return replace(weight, tiles=plan.tiles(weight.out_features, weight.in_features, role, size, hopper=on_hopper()))


def fold_norm(weight: Tensor, norm: Tensor) -> Tensor:
    """Multiply the weight of an RMSNorm into a projection of what it norms, in place; the norm has none any more.

    Args:
        weight: [out_features, in_features]; changed.
        norm: [in_features], dtype of the weight.

    Returns:
        The weight.
    """
    return weight.mul_(norm)


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: [..., in_features], dtype of the weight.
        weight: The projection, packed or not.

    Returns:
        [..., out_features].
    """
    _check_width(x, weight)
    return _product(x, weight, gated=False)


def norm_linear(x: Tensor, squares: Tensor | None, eps: float, weight: LinearWeight, *, gated: bool = False) -> Tensor:
    """Each row of x divided by its root mean square, the product, and with `gated` silu of its first half times its
    second.

    Args:
        x: [..., in_features], dtype of the weight.
        squares: What `add_linear` returned when it made x; None where something else did.
        eps: Added to the mean square.
        weight: The projection, with the norm's weight in it (`fold_norm`), packed or not; for the gate the gate's and
            up's rows stacked.
        gated: Whether to take silu(gate) * up.

    Returns:
        [..., out_features], or [..., out_features // 2] with the gate.
    """
    _check_width(x, weight)
    tile = _tile(x, weight)
    if tile is not None and _can_norm(tile, x, squares, weight):
        out: Tensor = norm_linear_op(x, squares, weight.weight, weight.bias, eps, gated, tile.to_ints())
        return out
    return _product(rmsnorm(x, None, eps), weight, gated=gated)


def _can_norm(tile: Tile, x: Tensor, squares: Tensor | None, weight: LinearWeight) -> bool:
    """Whether a tile norms these rows. cuBLAS rounds what is not normed yet: a float16 may overflow then."""
    if tile.is_library and (x.dtype == torch.float16 or weight.bias is not None):
        return False
    return tile.norms and (squares is not None or not tile.needs_squares)


def _product(x: Tensor, weight: LinearWeight, *, gated: bool) -> Tensor:
    """The product with what comes after it, by the kernel that was chosen for it or by the library."""
    tile = _tile(x, weight)
    if tile is not None:
        out: Tensor = skinny_linear_op(x, weight.weight, weight.bias, gated, replace(tile, norms=False).to_ints())
        return out
    out = _by_library(x, weight)
    return silu_and_mul(out) if gated else out


def _by_library(x: Tensor, weight: LinearWeight) -> Tensor:
    if weight.packed is None:
        if weight.weight is None:
            raise ValueError("weight holds neither a plain nor a packed matrix")
        return F.linear(x, weight.weight, weight.bias)
    rows = x.reshape(-1, weight.in_features)  # [num_rows, in_features]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight.packed, weight.bias, "none", [], "")
    return out.view(*x.shape[:-1], weight.out_features)


def add_linear(residual: Tensor, x: Tensor, weight: LinearWeight) -> Tensor | None:
    """Add the product to the residual, in place.

    Args:
        residual: [..., out_features], contiguous, dtype of x; changed.
        x: [..., in_features], dtype of the weight.
        weight: The projection, packed or not.

    Returns:
        [parts, rows] float32, parts of the sums of the squares of the residual's rows, for a product that norms with
        them; None where the kernel leaves none.
    """
    _check_width(x, weight)
    if residual.shape != (*x.shape[:-1], weight.out_features):
        raise ValueError(
            f"residual must be {(*x.shape[:-1], weight.out_features)} for x {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    tile = _tile(x, weight)
    if tile is not None:
        squares: Tensor = add_linear_op(residual, x, weight.weight, weight.bias, tile.to_ints())
        return squares if squares.shape[0] else None
    if weight.weight is not None and weight.bias is None and x.dim() == 2:
        residual.addmm_(x, weight.weight.t())
    else:
        residual.add_(_by_library(x, weight))
    return None


def _tile(x: Tensor, weight: LinearWeight) -> Tile | None:
    return pick(weight.tiles, x.shape[:-1].numel()) if weight.tiles else None


def _check_width(x: Tensor, weight: LinearWeight) -> None:
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x must be [..., {weight.in_features}], got {tuple(x.shape)}")
