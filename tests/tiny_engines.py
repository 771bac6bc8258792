"""Tiny engines on the CPU: a folder with a model and its tokenizer, and options that start in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mini_infer import EngineConfig
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import save_tiny_tokenizer


def make_tiny_folder(folder: Path, *, num_layers: int = 1) -> Path:
    """A Llama with grouped-query attention, random weights."""
    save_tiny_tokenizer(folder)
    make_tiny_model("llama3-gqa", folder, num_hidden_layers=num_layers)
    return folder


def tiny_config(folder: Path, **options: Any) -> EngineConfig:
    """Nothing is measured, and there is no swap space; the options win."""
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_model_len": 64,
        "num_cpu_blocks": 0,
        "measure_costs": False,
        "progress": False,
    }
    return EngineConfig(model=str(folder), **{**defaults, **options})
