"""The KV pool and its swap space, compared byte by byte."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mini_infer.graphs.kv_cache import KVCache, SwapPool

LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM = 3, 2, 4, 8
SPEC: Any = SimpleNamespace(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_cache(num_blocks: int, device: torch.device, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(SPEC, num_blocks, BLOCK_SIZE, dtype, device)


def fill_with_noise(kv: KVCache, seed: int) -> torch.Tensor:
    """Random bits, NaN patterns among them: a copy must not look at what it copies. Returns them as bytes."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (kv.blocks.numel() * kv.blocks.element_size(),), generator=generator, dtype=torch.uint8)
    kv.blocks.copy_(raw.view(kv.blocks.dtype).view(kv.blocks.shape))
    return content(kv)


def content(kv: KVCache) -> torch.Tensor:
    """[num_blocks + 1, bytes of a block], a copy."""
    by_block = kv.blocks.cpu().movedim(2, 0).contiguous()
    return by_block.view(torch.uint8).reshape(len(by_block), -1).clone()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_and_in_by_bytes(device: torch.device, dtype: torch.dtype) -> None:
    """What was swapped out comes back bit for bit, into other blocks; no other block changes."""
    kv = make_cache(9, device, dtype)
    before = fill_with_noise(kv, 0)
    pool = SwapPool(kv, 6)
    pool.swap_out([(7, 2), (1, 5), (9, 0)])
    assert torch.equal(content(kv), before)  # copying out changes nothing on the device
    scrambled = fill_with_noise(kv, 1)
    pool.swap_in([(3, 5), (8, 2), (1, 0)])
    expected = scrambled.clone()
    expected[3], expected[8], expected[1] = before[1], before[7], before[9]
    assert torch.equal(content(kv), expected)


def test_random_traffic(device: torch.device) -> None:
    """Hundreds of copies either way, against a list of bytes."""
    num_blocks, num_cpu_blocks = 12, 7
    kv = make_cache(num_blocks, device)
    pool = SwapPool(kv, num_cpu_blocks)
    on_device = fill_with_noise(kv, 2)
    on_cpu: dict[int, torch.Tensor] = {}
    address = kv.blocks.data_ptr()
    draw = random.Random(0)
    for step in range(120):
        if step % 10 == 9:
            on_device = fill_with_noise(kv, step)
        count = draw.randint(0, num_cpu_blocks)
        out = list(
            zip(draw.sample(range(1, num_blocks + 1), count), draw.sample(range(num_cpu_blocks), count), strict=True)
        )
        pool.swap_out(out)
        on_cpu.update({cpu: on_device[gpu].clone() for gpu, cpu in out})
        back = draw.sample(sorted(on_cpu), draw.randint(0, len(on_cpu)))
        pairs = list(zip(draw.sample(range(1, num_blocks + 1), len(back)), back, strict=True))
        pool.swap_in(pairs)
        for gpu, cpu in pairs:
            on_device[gpu] = on_cpu[cpu]
        assert torch.equal(content(kv), on_device)
    assert kv.blocks.data_ptr() == address


@pytest.mark.parametrize("num_cpu_blocks", [0, 3])
def test_no_pairs(device: torch.device, num_cpu_blocks: int) -> None:
    """Most steps swap nothing; an engine without swap space never does."""
    kv = make_cache(2, device)
    before = fill_with_noise(kv, 3)
    pool = SwapPool(kv, num_cpu_blocks)
    assert len(pool) == num_cpu_blocks
    for pairs in ([], ()):
        pool.swap_out(pairs)
        pool.swap_in(pairs)
    assert torch.equal(content(kv), before)
