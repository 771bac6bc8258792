"""The bytes behind the blocks: the paged K/V pool on the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mini_infer.graphs.spec import ModelSpec


class KVCache:
    """Paged K and V of all layers, the null block included.

    Args:
        spec: The model.
        num_blocks: Blocks that can be handed out; block 0, the null block, comes on top.
        block_size: Tokens per block.
        dtype: Type of the entries.
        device: Where it lives.

    Attributes:
        num_blocks: Blocks that can be handed out.
        blocks: [num_layers, 2, num_blocks + 1, num_kv_heads, block_size, head_dim]; index 1 is K then V.
        layers: (K, V) of each layer, views of ``blocks``: [num_blocks + 1, num_kv_heads, block_size, head_dim].
    """

    def __init__(
        self, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.num_layers, 2, num_blocks + 1, spec.num_kv_heads, block_size, spec.head_dim)
        self.num_blocks = num_blocks
        # Zeros, not empty: decode attention on a CPU computes a row once more if its sums are not finite, which values
        # that were never written might make them, though their weights are 0.
        self.blocks = (
            _lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple((layer[0], layer[1]) for layer in self.blocks)

    def select(self, layers: Sequence[int]) -> KVCache:
        """Some of the layers, in the same memory."""
        selected = copy.copy(self)
        selected.layers = tuple(self.layers[index] for index in layers)
        return selected


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written: NumPy leaves fresh pages to the operating system."""
    flat = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)
