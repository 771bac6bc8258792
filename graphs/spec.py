"""What a model is, as data: read once from its Hugging Face config, never from its code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from mini_infer.exceptions import UnsupportedModelError

SUPPORTED_ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "LlamaForCausalLM": "Llama 2, 3, 3.1, 3.2, SmolLM, SmolLM2",
        "MistralForCausalLM": "Mistral",
        "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
        "Qwen3ForCausalLM": "Qwen3",
    }
)
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MAX_HEAD_DIM = 256


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
    def from_hf_config(cls, config: Any) -> ModelSpec:
        """Read a `transformers.PretrainedConfig`.

        Raises:
            UnsupportedModelError: an architecture or an option that the decoder does not run.
        """
        architecture = check_architecture(getattr(config, "architectures", None))
        family = config.model_type
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention_bias = bool(getattr(config, "attention_bias", False))
        _check_options(config, head_dim)
        inv_freq, rope_scale = _rope_frequencies(config, head_dim)
        dtype = getattr(config, "dtype", None)
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            sliding_windows=_sliding_windows(config),
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )


def check_architecture(architectures: list[str] | None) -> str:
    """The supported architecture among those that a config names.

    Raises:
        UnsupportedModelError: there is none; the message lists what is supported.
    """
    for name in architectures or ():
        if name in SUPPORTED_ARCHITECTURES:
            return name
    supported = ", ".join(f"{name} ({models})" for name, models in SUPPORTED_ARCHITECTURES.items())
    named = ", ".join(architectures or ()) or "none (config.json has no 'architectures')"
    raise UnsupportedModelError(f"unsupported architecture: {named}; supported: {supported}")


def _check_options(config: Any, head_dim: int) -> None:
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"unsupported hidden_act {config.hidden_act!r}; supported: silu")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("unsupported: quantized weights (quantization_config); use the unquantized model")
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise UnsupportedModelError(f"unsupported head size {head_dim}; supported: even, at most {MAX_HEAD_DIM}")
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    if config.num_attention_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads={config.num_attention_heads} is no multiple of num_key_value_heads={num_kv_heads}"
        )


def _sliding_windows(config: Any) -> tuple[int, ...]:
    """Window of each layer, 0 for full attention."""
    window: int = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        if config.model_type != "mistral":
            window = 0
        num_layers: int = config.num_hidden_layers
        return (window,) * num_layers
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"unsupported layer type {layer_type!r}; supported: full_attention, sliding_attention"
            )
    return tuple(window if layer_type == "sliding_attention" else 0 for layer_type in layer_types)


def _rope_frequencies(config: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Frequencies of RoPE and the factor on cos and sin, by the Transformers library's own initialisation."""
    config.standardize_rope_params()
    parameters = config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise UnsupportedModelError(
            f"unsupported rope scaling {rope_type!r}; supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("unsupported: partial_rotary_factor other than 1")
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies: list[float] = (1.0 / parameters["rope_theta"] ** exponents).tolist()
        return tuple(frequencies), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    return tuple(inv_freq.tolist()), float(scale)
