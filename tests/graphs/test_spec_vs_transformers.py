"""Our reading of a config.json against the Transformers library's: the same facts, whatever the file leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from mini_infer.graphs.spec import DEFAULTS, SUPPORTED_ARCHITECTURES, ModelSpec
from mini_infer.loader import read_model_files

ARCHITECTURE = {name.removesuffix("ForCausalLM").lower(): name for name in SUPPORTED_ARCHITECTURES}
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LEFT_OUT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_theta",
    "sliding_window",
)
SPREAD: dict[str, dict[str, Any]] = {
    "as it is": {},
    "theta at the top": {"rope_theta": 5e5},
    "whole theta": {"rope_theta": 1000000},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "theta in both": {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "no theta": {"rope_parameters": {"rope_type": "default"}},
    "null scaling": {"rope_scaling": None, "rope_theta": 5e4},
    "old linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e4},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 3e4}},
    "both names of the type": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "old llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5, "max_position_embeddings": 512},
    "new llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "llama3 without its context": {
        "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "original_max_position_embeddings"},
        "max_position_embeddings": 256,
    },
    "old yarn": {"rope_scaling": {"type": "yarn", **{k: YARN[k] for k in YARN if k != "rope_type"}}},
    "new yarn": {"rope_parameters": {**YARN, "rope_theta": 1e6}},
    "yarn without its context": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512
    },
    "yarn with its context outside": {"rope_scaling": YARN, "original_max_position_embeddings": 100},
    "yarn's own attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.25}},
    "yarn's betas": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    "yarn's mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn that scales by 1": {"rope_scaling": {**YARN, "factor": 1.0}},
    "no partial rotary": {"partial_rotary_factor": 1.0},
    "a head size of its own": {"head_dim": 64},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "epsilon": {"rms_norm_eps": 1e-5},
    "old dtype": {"torch_dtype": "bfloat16"},
    "new dtype": {"dtype": "float16"},
    "both dtypes": {"dtype": "float16", "torch_dtype": "bfloat16"},
    "windows that are not used": {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 2},
    "windows on some layers": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "windows on all layers": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    "windows by default": {"use_sliding_window": True},
    "no window": {"sliding_window": None},
    **{f"no {name}": {"num_attention_heads": 64, name: ...} for name in LEFT_OUT},
}  # fmt: skip
ONE_FAMILY = {
    "no kv heads": ("llama", {"num_key_value_heads": None}),
    "no head size": ("llama", {"head_dim": None}),
    "a null head size": ("mistral", {"head_dim": None}),
    "layer types": ("qwen2", {"use_sliding_window": True, "sliding_window": 9,
                              "layer_types": ["full_attention", "sliding_attention"] * 2}),
    "layer types without windows": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    "old names of layer types": ("qwen3", {"layer_types": ["attention"] * 4}),
    "llama's layer types": ("llama", {"layer_types": ["full_attention"] * 4}),
}  # fmt: skip
CASES = [
    *((family, name, changes) for family in ARCHITECTURE for name, changes in SPREAD.items()),
    *((family, name, changes) for name, (family, changes) in ONE_FAMILY.items()),
]


def spec_of_library(config: PretrainedConfig) -> ModelSpec:
    """The facts as the library has them: sizes in its config, biases, norms and windows in the model it makes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = type(model.model.rotary_emb)(config)
    return ModelSpec(
        architecture=config.architectures[0],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=attention.q_proj.bias is not None,
        o_bias=attention.o_proj.bias is not None,
        mlp_bias=mlp.up_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        sliding_windows=tuple(windows_of_library(config)),
        inv_freq=tuple(rotary.inv_freq.tolist()),
        rope_scale=rotary.attention_scaling,
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    )


def windows_of_library(config: PretrainedConfig) -> list[int]:
    window = getattr(config, "sliding_window", None) or 0
    if config.model_type in ("qwen2", "qwen3"):
        return [window if layer_type == "sliding_attention" else 0 for layer_type in config.layer_types]
    return [window if config.model_type == "mistral" else 0] * config.num_hidden_layers


@pytest.mark.parametrize(("family", "name", "changes"), CASES, ids=[f"{family}-{name}" for family, name, _ in CASES])
def test_as_the_library_reads_it(family: str, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Whatever a file says or leaves out, our facts are the library's, to the last bit of every frequency."""
    config = {"architectures": [ARCHITECTURE[family]], "model_type": family, **SMALL, **changes}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    theirs = spec_of_library(AutoConfig.from_pretrained(tmp_path))
    assert read_model_files(tmp_path).spec == theirs


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_an_empty_config(family: str, tmp_path: Path) -> None:
    """With nothing but its name, a model has the library's default sizes."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURE[family]], "model_type": family}))
    assert read_model_files(tmp_path).spec == spec_of_library(AutoConfig.from_pretrained(tmp_path))
