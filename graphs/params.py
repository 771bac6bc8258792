"""The weights of one model, as the decoder reads them: projections fused, read-only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mini_infer.graphs.spec import ModelSpec
from mini_infer.kernels.linear import LinearWeight


@dataclass(frozen=True, slots=True)
class LayerParams:
    """Weights of one decoder layer. Those of its two norms are in ``qkv`` and ``gate_up``.

    Attributes:
        qkv: Query, key and value projections stacked, [q_size + 2 * kv_size, hidden_size].
        q_norm, k_norm: [head_dim] each, or None.
        o: [hidden_size, q_size].
        gate_up: Gate and up projections stacked, [2 * intermediate_size, hidden_size].
        down: [hidden_size, intermediate_size].
    """

    qkv: LinearWeight
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: LinearWeight
    gate_up: LinearWeight
    down: LinearWeight


@dataclass(frozen=True, slots=True)
class Params:
    """Weights of the whole model.

    Attributes:
        embedding: [vocab_size, hidden_size].
        layers: One entry for each decoder layer.
        norm: [hidden_size], after the last layer.
        head: [vocab_size, hidden_size]; the embedding's own memory when tied.
        cos, sin: RoPE tables, [max_positions, head_dim // 2] float32.
    """

    embedding: Tensor
    layers: tuple[LayerParams, ...]
    norm: Tensor
    head: LinearWeight
    cos: Tensor
    sin: Tensor


def rope_tables(spec: ModelSpec, max_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, scaled, each [max_positions, head_dim // 2] float32."""
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, torch.tensor(spec.inv_freq, dtype=torch.float32, device=device))
    return angles.cos() * spec.rope_scale, angles.sin() * spec.rope_scale
