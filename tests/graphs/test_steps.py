"""The model cut down to a few layers, on which steps are warmed up before they are captured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.prefill_inputs import PrefillBuffer
from mini_infer.graphs.state import DecodeState
from mini_infer.graphs.steps import Model
from mini_infer.loader import load_params, read_model_files
from mini_infer.typing import NULL_BLOCK
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")


def make_model(folder: Path, variant: str, num_layers: int) -> Model:
    make_tiny_model(variant, folder, num_hidden_layers=num_layers)
    files = read_model_files(folder)
    params = load_params(files, dtype=torch.float32, device=CPU, max_positions=16)
    return Model(
        files.spec, params, KVCache(files.spec, 5, 4, torch.float32, CPU), DecodeState(3, 4, files.spec.vocab_size, CPU)
    )


@pytest.mark.parametrize(
    ("variant", "num_layers", "chosen"),
    [
        ("llama3-gqa", 1, [0]),
        ("llama3-gqa", 2, [0, 1]),
        ("llama3-gqa", 5, [0, 4]),
        ("mistral-window", 4, [0, 3]),
        ("qwen2-window", 5, [0, 1, 4]),  # one full layer, then windows
    ],
)
def test_few_layers(tmp_path: Path, variant: str, num_layers: int, chosen: list[int]) -> None:
    """The first of each kind and the last: their weights, their windows, their part of the cache."""
    model = make_model(tmp_path, variant, num_layers)
    few = model.few_layers()
    assert few.spec.num_layers == len(chosen)
    assert few.spec.sliding_windows == tuple(model.spec.sliding_windows[index] for index in chosen)
    for layer, caches, index in zip(few.params.layers, few.kv.layers, chosen, strict=True):
        assert layer is model.params.layers[index]
        assert [cache.data_ptr() for cache in caches] == [cache.data_ptr() for cache in model.kv.layers[index]]
    assert len(model.params.layers) == len(model.kv.layers) == num_layers


def test_its_steps_leave_no_trace(tmp_path: Path) -> None:
    """On padding they write to the null block, and the rows stay as they are."""
    model = make_model(tmp_path, "qwen2-window", 4)
    few, buffer = model.few_layers(), PrefillBuffer(8, 2, block_size=4, max_blocks=4, state=model.state, device=CPU)
    buffer.fill(())
    rows = model.state.rows(3)
    before = [rows.token_ids.clone(), rows.seq_lens.clone()]
    assert few.run_prefill(buffer.inputs).shape[1] == few.run_decode(3).shape[1] == 2
    assert torch.equal(rows.token_ids, before[0])
    assert torch.equal(rows.seq_lens, before[1])
    used = model.kv.blocks.any(dim=-1).any(dim=-1).any(dim=-1).any(dim=1).any(dim=0).nonzero().flatten().tolist()
    assert used == [NULL_BLOCK]
