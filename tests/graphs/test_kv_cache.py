"""The KV pool: its layout, and the memory it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mini_infer.graphs.kv_cache import KVCache

LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM = 3, 2, 4, 8
SPEC: Any = SimpleNamespace(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_cache(num_blocks: int, device: torch.device, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(SPEC, num_blocks, BLOCK_SIZE, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout(device: torch.device, dtype: torch.dtype) -> None:
    """Zeros (a masked score times a NaN would be one), one block more than asked for, layers as views of one tensor."""
    kv = make_cache(5, device, dtype)
    assert kv.blocks.shape == (LAYERS, 2, 6, HEADS, BLOCK_SIZE, HEAD_DIM)
    assert (kv.num_blocks, kv.blocks.dtype, kv.blocks.device.type) == (5, dtype, device.type)
    assert not kv.blocks.any()
    assert len(kv.layers) == LAYERS
    kv.layers[1][1][3, 0, 2, 5] = 1.0
    assert kv.blocks.nonzero().tolist() == [[1, 1, 3, 0, 2, 5]]


def test_a_large_pool_takes_no_memory_before_it_is_written() -> None:
    """On a CPU the pool may be most of the free memory: only what is written is taken."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    kv = make_cache(400_000, torch.device("cpu"))
    assert kv.blocks.numel() * 4 > 500 * 2**20
    kv.blocks[:, :, 12_345] = 1.0
    assert resident() - before < 50 * 2**20


def test_some_layers_in_the_same_memory(device: torch.device) -> None:
    """A selection writes to the layers that were chosen, and leaves the cache it came from as it is."""
    kv = make_cache(5, device)
    kv.select([0, 2]).layers[1][0][4, 1, 0, 3] = 1.0
    assert kv.blocks.nonzero().tolist() == [[2, 0, 4, 1, 0, 3]]
    assert (len(kv.layers), len(kv.select([0, 2]).layers)) == (LAYERS, 2)
