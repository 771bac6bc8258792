"""Angular frequencies of RoPE, plain or scaled to longer contexts, from the parameters in a Hugging Face config.

The arithmetic is float32 in the order of the Transformers library's, so that both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mini_infer.exceptions import UnsupportedModelError

DEFAULT_THETA = 10000.0
YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0

RopeParameters: TypeAlias = Mapping[str, Any]


def rope_frequencies(parameters: RopeParameters, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Frequencies of the RoPE pairs and the factor on cos and sin.

    Args:
        parameters: ``rope_type``, ``rope_theta`` and what that type of scaling takes.
        head_dim: Width of one head.

    Returns:
        (``head_dim // 2`` frequencies in radians per token, the factor).

    Raises:
        UnsupportedModelError: a type of scaling that is not supported, or a parameter that is missing or no number.
    """
    rope_type = parameters["rope_type"]
    scaling = _SCALINGS.get(rope_type) if isinstance(rope_type, str) else None
    if scaling is None:
        raise UnsupportedModelError(
            f"unsupported rope scaling {rope_type!r}; supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"unsupported: partial_rotary_factor {parameters['partial_rotary_factor']}, only 1 is supported"
        )
    inv_freq, scale = scaling(parameters, head_dim)
    return tuple(inv_freq.tolist()), scale


def _plain(parameters: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    return 1.0 / _waves(parameters, head_dim), 1.0


def _linear(parameters: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """Positions divided by ``factor``."""
    return 1.0 / _waves(parameters, head_dim) / _number(parameters, "factor"), 1.0


def _llama3(parameters: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """Llama 3.1: short waves as they are, long ones ``factor`` times as long, a blend between."""
    inv_freq = 1.0 / _waves(parameters, head_dim)
    factor = _number(parameters, "factor")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    context = _number(parameters, "original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    share = (context / wavelength - low) / (high - low)  # of the unscaled frequency in the blend
    blend = (1 - share) * inv_freq / factor + share * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, inv_freq)
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blend, scaled), 1.0


def _yarn(parameters: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over the dimensions, and a factor on cos and sin."""
    factor, theta = _number(parameters, "factor"), _number(parameters, "rope_theta")
    context = _number(parameters, "original_max_position_embeddings")

    def dimension(rotations: float) -> float:
        """The dimension that turns this often within the original context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(_number(parameters, "beta_fast", YARN_BETA_FAST))
    high = dimension(_number(parameters, "beta_slow", YARN_BETA_SLOW))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    waves, unscaled = _waves(parameters, head_dim), 1 - ramp
    inv_freq = 1.0 / (factor * waves) * (1 - unscaled) + 1.0 / waves * unscaled
    return inv_freq, _yarn_scale(parameters, factor)


def _yarn_scale(parameters: RopeParameters, factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")

    def by(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return by(_number(parameters, "mscale")) / by(_number(parameters, "mscale_all_dim"))
    return by(1.0)


def _waves(parameters: RopeParameters, head_dim: int) -> Tensor:
    """Tokens per radian of each pair without scaling, [head_dim // 2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    waves: Tensor = _number(parameters, "rope_theta") ** exponents
    return waves


def _number(parameters: RopeParameters, name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UnsupportedModelError(
            f"rope scaling {parameters['rope_type']!r} needs a positive number as {name}, got {value!r}"
        )
    return float(value)


_SCALINGS: Mapping[str, Callable[[RopeParameters, int], tuple[Tensor, float]]] = MappingProxyType(
    {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
)
SUPPORTED_ROPE_TYPES = tuple(_SCALINGS)
