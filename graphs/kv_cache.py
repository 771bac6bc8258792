"""The bytes behind the blocks: the paged K/V pool on the device, and the pool of swapped blocks in CPU memory."""

from __future__ import annotations

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
        # Zeros, not empty: a masked score times a value that was never written must not be NaN.
        self.blocks = (
            _lazy_zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.layers: tuple[tuple[Tensor, Tensor], ...] = tuple((layer[0], layer[1]) for layer in self.blocks)


class SwapPool:
    """CPU blocks of preempted sequences, in page-locked memory when the cache is on a GPU.

    Args:
        kv: The cache whose blocks it saves.
        num_blocks: CPU blocks.
    """

    def __init__(self, kv: KVCache, num_blocks: int) -> None:
        layers, two, _, heads, block_size, head_dim = kv.blocks.shape
        self._kv = kv
        # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]: a block is one contiguous piece.
        self._blocks = torch.empty(
            (num_blocks, layers, two, heads, block_size, head_dim),
            dtype=kv.blocks.dtype,
            pin_memory=kv.blocks.is_cuda and num_blocks > 0,
        )

    def __len__(self) -> int:
        return len(self._blocks)

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (device block, CPU block) pairs from the device."""
        if not pairs:
            return
        gpu, cpu = self._indices(pairs)
        moved = self._kv.blocks.index_select(2, gpu.to(self._kv.blocks.device))
        self._blocks.index_copy_(0, cpu, moved.movedim(2, 0).contiguous().cpu())

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (device block, CPU block) pairs to the device."""
        if not pairs:
            return
        gpu, cpu = self._indices(pairs)
        device = self._kv.blocks.device
        moved = self._blocks.index_select(0, cpu).to(device)
        self._kv.blocks.index_copy_(2, gpu.to(device), moved.movedim(0, 2))

    @staticmethod
    def _indices(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        gpu, cpu = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        return gpu, cpu


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written: NumPy leaves fresh pages to the operating system."""
    flat = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(dtype).view(shape)
