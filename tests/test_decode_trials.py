"""Whole decode steps with one choice of kernels or another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mini_infer.kernels.linear import pick
from mini_infer.kernels.linear_plan import M_BUCKETS, Tile
from mini_infer.loader import load_params, read_model_files
from scripts.decode_trials import CONTEXT, Choice, DecodeTrials, with_choice
from tests.tiny_models import make_tiny_model

LIBRARY: Choice = dict.fromkeys(("qkv", "o", "gate_up", "down", "head"))


def test_every_layer_has_the_choice(tmp_path: Path) -> None:
    """For any number of rows; the weights are the same ones."""
    make_tiny_model("llama3-gqa", tmp_path)
    files = read_model_files(tmp_path)
    params = load_params(files, dtype=torch.float32, device=torch.device("cpu"), max_positions=16)
    tile = Tile("gemv", 2, 64, 4)
    chosen = with_choice(params, {**LIBRARY, "o": tile})
    for layer, before in zip(chosen.layers, params.layers, strict=True):
        for rows in (1, M_BUCKETS[-1]):
            assert pick(layer.o.tiles, rows) == tile
            assert pick(layer.down.tiles, rows) is None
        assert layer.o.packed is before.o.packed and layer.o.weight is before.o.weight
    assert pick(chosen.head.tiles, 1) is None


@pytest.mark.gpu
def test_choices_are_timed(tmp_path: Path) -> None:
    """One time for each, and about the same for the same choice."""
    make_tiny_model("llama3-gqa", tmp_path, max_position_embeddings=4 * CONTEXT)
    trials = DecodeTrials(str(tmp_path), max_rows=4)
    other: Choice = {**LIBRARY, "o": Tile("dot", 16, 64, 2, leaves=True), "head": Tile("gemv", 1, 64, 4)}
    trials.compile([(4, LIBRARY), (4, other)])
    first, again, third = trials.measure(4, [LIBRARY, LIBRARY, other])
    assert 0 < first < 100 and 0 < third < 100
    assert 0.5 < again / first < 2
