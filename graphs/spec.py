"""What a model is, as data: read once from its ``config.json``, never from its code.

The file is read here and not by the Transformers library, whose import alone takes seconds. What a file leaves out is
what that library takes then; the tests hold the two side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from mini_infer.exceptions import UnsupportedModelError
from mini_infer.graphs.rope import DEFAULT_THETA, rope_frequencies

SUPPORTED_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2",
        "MistralForCausalLM": "Mistral",
        "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
        "Qwen3ForCausalLM": "Qwen3",
    }
)
MAX_HEAD_DIM = 256

_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN2: Mapping[str, Any] = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": {
            **_LLAMA,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        "qwen2": _QWEN2,
        "qwen3": {**_QWEN2, "head_dim": 128},
    }
)
"""By ``model_type``: what the Transformers library takes where a config.json says nothing."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The static facts of one decoder of the Llama family.

    Attributes:
        architecture: Name in the Hugging Face config.
        vocab_size: Rows of the embedding and of the head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_dim: Width of one head.
        rms_norm_eps: Epsilon of every RMSNorm.
        max_position_embeddings: Longest sequence the model was made for, in tokens.
        tie_word_embeddings: The head is the embedding.
        qkv_bias, o_bias, mlp_bias: Which products have a bias.
        qk_norm: RMSNorm over each query and key head before RoPE.
        sliding_windows: Per layer: the last tokens that a token attends to, itself included; 0 for all.
        inv_freq: Angular frequency of each RoPE pair, ``head_dim // 2`` of them.
        rope_scale: Factor on cos and sin (yarn's attention factor; else 1).
        dtype: Type the weights were trained in, as the config says; None if it does not.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int, ...]
    inv_freq: tuple[float, ...]
    rope_scale: float
    dtype: str | None

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

    @property
    def longest_window(self) -> int:
        """The most tokens that a token attends to in any layer, itself included; 0 if a layer attends to all."""
        return max(self.sliding_windows) if all(self.sliding_windows) else 0

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of K and V of one token over all layers."""
        return 2 * self.num_layers * self.kv_size * itemsize

    def num_parameters(self) -> int:
        """Weights of the model, a tied head counted once."""
        qkv = (self.q_size + 2 * self.kv_size) * (self.hidden_size + self.qkv_bias)
        output = self.hidden_size * (self.q_size + self.o_bias)
        gate_up = 2 * self.intermediate_size * (self.hidden_size + self.mlp_bias)
        down = self.hidden_size * (self.intermediate_size + self.mlp_bias)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (qkv + output + gate_up + down + norms) + embeddings + self.hidden_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read what a ``config.json`` says.

        Raises:
            UnsupportedModelError: an architecture or an option that the decoder does not run, or a value that cannot
                be.
        """
        architecture = check_architecture(config.get("architectures"))
        family = _check_family(architecture, config.get("model_type"))
        values = {**DEFAULTS[family], **config}
        _check_options(values)
        num_heads = _integer(values, "num_attention_heads")
        num_kv_heads = num_heads if values["num_key_value_heads"] is None else _integer(values, "num_key_value_heads")
        if num_heads % num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}"
            )
        head_dim = _head_dim(values, num_heads)
        inv_freq, rope_scale = rope_frequencies(_rope_parameters(values), head_dim)
        # Biases are options of some families only: the others' code does not read them.
        attention_bias = family in ("llama", "qwen3") and _flag(values, "attention_bias")
        dtype = values.get("dtype") or values.get("torch_dtype")
        return cls(
            architecture=architecture,
            vocab_size=_integer(values, "vocab_size"),
            hidden_size=_integer(values, "hidden_size"),
            intermediate_size=_integer(values, "intermediate_size"),
            num_layers=_integer(values, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(values, "rms_norm_eps"),
            max_position_embeddings=_integer(values, "max_position_embeddings"),
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=family == "llama" and _flag(values, "mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_windows=_sliding_windows(values, family),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )


def check_architecture(architectures: object) -> str:
    """The supported architecture among those that a config names.

    Raises:
        UnsupportedModelError: there is none; the message lists what is supported.
    """
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if isinstance(name, str) and name in SUPPORTED_ARCHITECTURES:
            return name
    supported = ", ".join(f"{name} ({models})" for name, models in SUPPORTED_ARCHITECTURES.items())
    named = ", ".join(map(str, names)) or "none (config.json has no 'architectures')"
    raise UnsupportedModelError(f"unsupported architecture: {named}; supported: {supported}")


def _check_family(architecture: str, model_type: object) -> str:
    """The family of an architecture, which is also its ``model_type``."""
    family = architecture.removesuffix("ForCausalLM").lower()
    if model_type != family:
        raise UnsupportedModelError(f"{architecture} goes with model_type {family!r}, got {model_type!r}")
    return family


def _check_options(values: Mapping[str, Any]) -> None:
    if values["hidden_act"] != "silu":
        raise UnsupportedModelError(f"unsupported hidden_act {values['hidden_act']!r}; supported: silu")
    for name in ("quantization_config", "compression_config"):
        if values.get(name) is not None:
            raise UnsupportedModelError(f"unsupported: quantized weights ({name}); use the unquantized model")


def _head_dim(values: Mapping[str, Any], num_heads: int) -> int:
    if values["head_dim"] is not None:
        head_dim = _integer(values, "head_dim")
    else:
        hidden_size = _integer(values, "hidden_size")
        if hidden_size % num_heads:
            raise UnsupportedModelError(
                f"hidden_size={hidden_size} is no multiple of num_attention_heads={num_heads}, and there is no head_dim"
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(f"unsupported head size {head_dim}; supported: even, at most {MAX_HEAD_DIM}")
    return head_dim


def _sliding_windows(values: Mapping[str, Any], family: str) -> tuple[int, ...]:
    """Window of each layer, 0 for full attention."""
    num_layers = _integer(values, "num_hidden_layers")
    by_layer = family in ("qwen2", "qwen3")
    used = _flag(values, "use_sliding_window") if by_layer else family == "mistral"
    window = _integer(values, "sliding_window") if used and values["sliding_window"] is not None else 0
    layer_types = values.get("layer_types")
    if layer_types is None:
        first = _integer(values, "max_window_layers", low=0) if by_layer else 0
        return tuple(window if layer >= first else 0 for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise UnsupportedModelError(f"layer_types must name num_hidden_layers={num_layers} types, got {layer_types!r}")
    for layer_type in layer_types:
        if layer_type not in ("attention", "full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"unsupported layer type {layer_type!r}; supported: full_attention, sliding_attention"
            )
    windows = tuple(window if layer_type == "sliding_attention" else 0 for layer_type in layer_types)
    if not by_layer and windows != (window,) * num_layers:
        raise UnsupportedModelError(f"unsupported: layer_types that differ from a {family} model's own, {layer_types}")
    return windows


def _rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of RoPE in today's form: older files have some of them at the top level, or by other names."""
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise UnsupportedModelError(f"rope_parameters must be an object, got {parameters!r}")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError("unsupported: rope_parameters by layer type")
    outer = {
        "rope_type": parameters.get("type", "default"),
        "rope_theta": values.get("rope_theta", DEFAULT_THETA),
        "original_max_position_embeddings": values["max_position_embeddings"],
    }
    if values.get("partial_rotary_factor") is not None:
        outer["partial_rotary_factor"] = values["partial_rotary_factor"]
    merged = {**outer, **parameters}
    if "original_max_position_embeddings" in values:
        merged["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    return merged


def _integer(values: Mapping[str, Any], name: str, low: int = 1) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UnsupportedModelError(f"{name} must be an integer of at least {low}, got {value!r}")
    return value


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UnsupportedModelError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values[name]
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"{name} must be true or false, got {value!r}")
    return value
