"""The matrix product of a decoder layer: y = x @ weight.T + bias, alone or with silu(gate) * up taken of its result.

On the CPU in float32 `pack_linear` reorders a weight once into oneDNN's blocked layout; the product then runs 2 to 3
times faster than `F.linear` at 1 to 256 rows (measured on two EPYC cores), which is most of a CPU decode step. The
plain weight is dropped, so no memory is spent twice.

On a GPU `with_tiles` attaches to a weight which of the kernels of `skinny_linear` to use for 1 to 64 rows. The choice
depends on shapes alone, so it is made once, when a step is captured. Everything else is `F.linear`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_infer.kernels.activation import silu_and_mul
from mini_infer.kernels.linear_plan import LinearPlan, Tiles, pick
from mini_infer.kernels.skinny_linear import linear_op, linear_silu_mul_op

_PACK_ROWS = 8  # the row count that oneDNN is told to expect; the layout chosen is good at 1 to 256


@dataclass(frozen=True)
class LinearWeight:
    """One projection: exactly one of `weight` ([out_features, in_features]) and `packed` (oneDNN's layout) is set.

    `tiles` and `gated_tiles` hold the choices for `linear` and `linear_silu_mul` on a GPU; empty means `F.linear`.
    """

    weight: Tensor | None
    bias: Tensor | None  # [out_features]
    packed: Tensor | None
    out_features: int
    in_features: int
    tiles: Tiles = ()
    gated_tiles: Tiles = ()

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


def with_tiles(weight: LinearWeight, plan: LinearPlan) -> LinearWeight:
    """The same projection with the plan's choices; `weight` itself where there is no choice (CPU, packed)."""
    plain = weight.weight
    if plain is None or plain.device.type != "cuda" or plain.stride(1) != 1:
        return weight
    n, k, size = weight.out_features, weight.in_features, plain.element_size()
    return replace(
        weight,
        tiles=plan.tiles(n, k, gated=False, element_size=size),
        gated_tiles=plan.tiles(n, k, gated=True, element_size=size) if n % 2 == 0 else (),
    )


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x @ weight.T + bias.

    Args:
        x: [..., in_features], dtype of the weight.
        weight: The projection, packed or not.

    Returns:
        [..., out_features].
    """
    if x.shape[-1] != weight.in_features:
        raise ValueError(f"x must be [..., {weight.in_features}], got {tuple(x.shape)}")
    if weight.packed is None:
        if weight.weight is None:
            raise ValueError("weight holds neither a plain nor a packed matrix")
        if weight.tiles:
            tile = pick(weight.tiles, x.shape[:-1].numel())
            if tile is not None:
                tiled: Tensor = linear_op(x, weight.weight, weight.bias, tile.to_ints())
                return tiled
        return F.linear(x, weight.weight, weight.bias)
    rows = x.reshape(-1, weight.in_features)  # [num_rows, in_features]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight.packed, weight.bias, "none", [], "")
    return out.view(*x.shape[:-1], weight.out_features)


def linear_silu_mul(x: Tensor, weight: LinearWeight) -> Tensor:
    """silu(g) * u, where [g, u] = x @ weight.T + bias: the product and the gated activation as one kernel where that
    is faster.

    Args:
        x: [..., in_features], dtype of the weight.
        weight: Gate and up projections stacked, packed or not.

    Returns:
        [..., out_features // 2].
    """
    if weight.gated_tiles and weight.weight is not None:
        if x.shape[-1] != weight.in_features:
            raise ValueError(f"x must be [..., {weight.in_features}], got {tuple(x.shape)}")
        tile = pick(weight.gated_tiles, x.shape[:-1].numel())
        if tile is not None:
            out: Tensor = linear_silu_mul_op(x, weight.weight, weight.bias, tile.to_ints())
            return out
    return silu_and_mul(linear(x, weight))
