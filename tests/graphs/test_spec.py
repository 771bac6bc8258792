"""A model's facts from its Hugging Face config: right for what is supported, refused by name for the rest."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mini_infer.exceptions import UnsupportedModelError
from mini_infer.graphs.params import rope_tables
from mini_infer.graphs.rope import SUPPORTED_ROPE_TYPES
from mini_infer.graphs.spec import MAX_HEAD_DIM, SUPPORTED_ARCHITECTURES, ModelSpec
from mini_infer.loader import read_model_files
from tests.tiny_models import VARIANTS, make_tiny_model


@dataclass(frozen=True)
class Case:
    """A variant as the Transformers library runs it, and what we read from its folder."""

    name: str
    model: PreTrainedModel
    spec: ModelSpec


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    model = make_tiny_model(request.param, folder)
    return Case(request.param, model, read_model_files(folder).spec)


def test_parameter_count(case: Case) -> None:
    """What the library counts, a tied head once."""
    assert case.spec.num_parameters() == case.model.num_parameters()


def test_rope_frequencies(case: Case) -> None:
    """inv_freq and the factor on cos and sin are those of the library's own rotary embedding."""
    rotary = case.model.model.rotary_emb
    torch.testing.assert_close(torch.tensor(case.spec.inv_freq), rotary.inv_freq, rtol=1e-6, atol=0)
    assert case.spec.rope_scale == pytest.approx(rotary.attention_scaling)


def test_rope_tables(case: Case) -> None:
    """cos and sin of every position are the library's, whose halves are ours twice."""
    cos, sin = rope_tables(case.spec, 300, torch.device("cpu"))
    theirs = case.model.model.rotary_emb(torch.zeros(1, 300, 8), torch.arange(300)[None])
    for ours, expected in zip((cos, sin), theirs, strict=True):
        torch.testing.assert_close(torch.cat((ours, ours), dim=-1), expected[0], rtol=1e-5, atol=1e-5)


def test_shapes(case: Case) -> None:
    """Sizes, biases and norms are those of the library's modules, not only of its config."""
    attention, mlp = case.model.model.layers[0].self_attn, case.model.model.layers[0].mlp
    spec = case.spec
    assert (spec.num_layers, spec.vocab_size, spec.hidden_size) == (
        len(case.model.model.layers),
        *case.model.model.embed_tokens.weight.shape,
    )
    assert attention.q_proj.weight.shape == (spec.q_size, spec.hidden_size)
    assert attention.k_proj.weight.shape == (spec.kv_size, spec.hidden_size)
    assert mlp.up_proj.weight.shape == (spec.intermediate_size, spec.hidden_size)
    assert spec.qkv_bias == (attention.q_proj.bias is not None)
    assert spec.o_bias == (attention.o_proj.bias is not None)
    assert spec.mlp_bias == (mlp.down_proj.bias is not None)
    assert spec.qk_norm == hasattr(attention, "q_norm")
    assert spec.rms_norm_eps == case.model.model.norm.variance_epsilon
    assert spec.tie_word_embeddings == (case.model.lm_head.weight is case.model.model.embed_tokens.weight)
    assert spec.max_position_embeddings == 512
    assert spec.kv_bytes_per_token(4) == 4 * 2 * spec.num_layers * attention.k_proj.weight.shape[0]


def test_sliding_windows(case: Case) -> None:
    """Mistral's window is on every layer, Qwen2's only from max_window_layers on, and only if it is used."""
    expected = {"qwen2-window": (0, 9, 9), "mistral-window": (13, 13, 13)}
    assert case.spec.sliding_windows == expected.get(case.name, (0,) * case.spec.num_layers)
    assert case.spec.longest_window == (13 if case.name == "mistral-window" else 0)


# Configs as they are published. The numbers of parameters are the published ones.

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "torch_dtype": "float16",
}
LLAMA31 = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7b": (LLAMA, 6_738_415_616),
    "Llama-3.1-8B": (LLAMA31, 8_030_261_248),
    "SmolLM2-135M": (
        {
            **LLAMA,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
            "rope_theta": 100000,
        },
        134_515_008,
    ),
    "Mistral-7B-v0.1": (
        {
            **LLAMA,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (QWEN25, 494_032_768),
    "Qwen3-0.6B": (
        {
            **QWEN25,
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "sliding_window": None,
        },
        596_049_920,
    ),
}


def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_files(folder).spec


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path) -> None:
    """Real config.json files, written by older versions of the library, are understood."""
    config, num_parameters = PUBLISHED[name]
    spec = read(tmp_path, config)
    assert spec.num_parameters() == num_parameters
    assert spec.dtype == config["torch_dtype"]
    window = 4096 if "Mistral" in name else 0
    assert spec.sliding_windows == (window,) * spec.num_layers
    theta = config.get("rope_theta", 10000.0)
    assert spec.inv_freq[0] == 1.0
    if "rope_scaling" not in config:
        assert spec.inv_freq[-1] == pytest.approx(theta ** -(1 - 2 / spec.head_dim), rel=1e-5)


def test_llama31_frequencies(tmp_path: Path) -> None:
    """By the published formula: short waves as they are, long ones eight times as long, a blend between."""
    spec = read(tmp_path, LLAMA31)
    for index, ours in enumerate(spec.inv_freq):
        plain = 500000.0 ** (-2 * index / 128)
        turns = 8192 * plain / (2 * torch.pi)  # rotations within the original context
        blend = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
        assert ours == pytest.approx((1 - blend) * plain / 8 + blend * plain, rel=1e-5)


def test_old_names_of_rope_scaling(tmp_path: Path) -> None:
    """`type` is the older name of `rope_type`."""
    spec = read(tmp_path, {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert spec.inv_freq[0] == pytest.approx(0.25)


# What is not supported


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", *SUPPORTED_ARCHITECTURES]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures", *SUPPORTED_ARCHITECTURES]),
        ({"architectures": []}, ["architectures", *SUPPORTED_ARCHITECTURES]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", *SUPPORTED_ROPE_TYPES]),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64,
                              "original_max_position_embeddings": 2048}},
            ["longrope", *SUPPORTED_ROPE_TYPES],
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         ["partial_rotary_factor"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quantization_config"]),
        ({"compression_config": {"format": "float-quantized"}}, ["compression_config"]),
        ({"head_dim": 15}, ["even", "15"]),
        ({"head_dim": 258}, ["head size 258", str(MAX_HEAD_DIM)]),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, ["num_attention_heads=32", "num_key_value_heads=5"]),
        ({"num_attention_heads": 48, "num_key_value_heads": 6}, ["hidden_size=4096", "num_attention_heads=48"]),
        ({"model_type": "mistral"}, ["LlamaForCausalLM", "'llama'", "'mistral'"]),
        ({"hidden_size": "many"}, ["hidden_size", "integer", "'many'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1", "0"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"max_position_embeddings": True}, ["max_position_embeddings", "True"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "number", "'1e-5'"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false", "'yes'"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor", "None"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1.0}}, ["yarn", "factor", "-1.0"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3", "low_freq_factor"]),
        ({"rope_scaling": [1.0]}, ["rope_parameters", "object", "[1.0]"]),
        ({"rope_scaling": {"rope_type": ["linear"]}}, ["rope scaling", "linear", *SUPPORTED_ROPE_TYPES]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["by layer type"]),
        ({"rope_theta": 0}, ["rope_theta", "positive", "0"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "num_hidden_layers=32"]),
        ({"layer_types": ["sliding_attention"] * 32, "sliding_window": 8, "architectures": ["MistralForCausalLM"],
          "model_type": "mistral", "num_hidden_layers": 31}, ["num_hidden_layers=31"]),
        ({"layer_types": ["full_attention"] * 32, "sliding_window": 8, "architectures": ["MistralForCausalLM"],
          "model_type": "mistral"}, ["layer_types", "mistral"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refused_by_name(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """Never run wrongly: the message names what is not supported, and what is."""
    with pytest.raises(UnsupportedModelError) as raised:
        read(tmp_path, {**LLAMA, **changes})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_partial_rotary_at_the_top_level(architecture: str, tmp_path: Path) -> None:
    """Older configs have the factor beside the others."""
    model_type = architecture.removesuffix("ForCausalLM").lower()
    config = {**LLAMA, "architectures": [architecture], "model_type": model_type, "partial_rotary_factor": 0.5}
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        read(tmp_path, config)


def test_unknown_layer_type(tmp_path: Path) -> None:
    """Only full and sliding attention are run."""
    config = {**QWEN25, "layer_types": ["chunked_attention"] * 24}
    with pytest.raises(UnsupportedModelError, match=r"chunked_attention.*full_attention, sliding_attention"):
        read(tmp_path, config)


def test_an_alias_beside_a_supported_architecture(tmp_path: Path) -> None:
    """The first supported one counts."""
    assert read(tmp_path, {**LLAMA, "architectures": ["MyLlama", "LlamaForCausalLM"]}).architecture == (
        "LlamaForCausalLM"
    )


def test_kv_heads_default_to_all_heads(tmp_path: Path) -> None:
    """Llama 1 and early Llama 2 configs do not name them."""
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read(tmp_path, config).num_kv_heads == 32
