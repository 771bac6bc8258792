"""Tiny random models of every family and variant that the engine supports, made by the Transformers library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from mini_infer import SamplingParams

VOCAB_SIZE = 320
MAX_POSITIONS = 512

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.15,  # wide enough for logits that differ
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama2-mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama3-gqa": (LlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 2, **_rope("default")}),
    "llama-mqa-tied": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama31-rope": (
        LlamaConfig,
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-linear-rope": (LlamaConfig, _rope("linear", factor=4.0)),
    "llama-yarn-rope": (LlamaConfig, _rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "smollm-3-heads": (LlamaConfig, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}),
    "mistral-window": (MistralConfig, {"sliding_window": 13}),
    "mistral-full": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-window": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3-tied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    **{
        f"llama-head-{size}": (LlamaConfig, {"head_dim": size, "num_hidden_layers": 2})
        for size in (64, 80, 96, 128, 256)
    },
}


def make_tiny_model(variant: str, folder: Path, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Save a random model of ``variant`` to ``folder`` (without a tokenizer) and return it, in float32."""
    config_class, options = VARIANTS[variant]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config_class(**{**_BASE, **options, **changes}), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # made as ones and zeros, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model = model.float().eval()
    model.generation_config.eos_token_id = config_class(**_BASE).eos_token_id
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    """The model's own greedy continuation, end-of-sequence tokens taken as any other. ``options``: of `generate`."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        min_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
        **options,
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def penalized(model: PreTrainedModel, prompt: list[int], params: SamplingParams) -> list[int]:
    """Greedy tokens, penalties worked out from the tokens so far at each step."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        logits = model(torch.tensor([tokens])).logits[0, -1].tolist()
        outputs = tokens[len(prompt) :]
        for token in set(tokens):
            x = logits[token]
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
            x -= params.frequency_penalty * outputs.count(token) + params.presence_penalty * (token in outputs)
            logits[token] = x
        tokens.append(max(range(len(logits)), key=logits.__getitem__))
    return tokens[len(prompt) :]
