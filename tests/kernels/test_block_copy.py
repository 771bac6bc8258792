"""Gathering and scattering KV cache blocks, bit by bit."""

import pytest
import torch

from mini_infer.kernels.block_copy import (
    _launch_gather_blocks,
    _launch_scatter_blocks,
    gather_blocks,
    scatter_blocks,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {4: torch.int32, 2: torch.int16}


def noise(shape, dtype, device):
    """Random bits, NaN patterns among them."""
    integers = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integers)
    return torch.randint(limits.min, limits.max, shape, dtype=integers).view(dtype).to(device)


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_parts,part_size,ids", [(6, 64, [3, 0, 8]), (2, 4100, [5]), (4, 24, [7, 2, 1, 6, 4])])
def test_gather(backend, num_parts, part_size, ids, dtype):
    """Every part of every named block, from a cache that is a view; the cache keeps every bit."""
    pool = noise((num_parts, 9, part_size + 8), dtype, backend.device)
    before, cache = pool.clone(), pool[..., :part_size]
    staged = noise((len(ids), num_parts, part_size), dtype, backend.device)
    block_ids = torch.tensor(ids, device=backend.device)
    backend.pick(gather_blocks, _launch_gather_blocks)(cache, block_ids, staged)
    for index, block in enumerate(ids):
        assert torch.equal(bits(staged[index]), bits(cache[:, block]))
    assert torch.equal(bits(pool), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_parts,part_size,ids", [(6, 64, [3, 0, 8]), (2, 4100, [5]), (4, 24, [7, 2, 1, 6, 4])])
def test_scatter(backend, num_parts, part_size, ids, dtype):
    """Exactly the named blocks change."""
    pool = noise((num_parts, 9, part_size + 8), dtype, backend.device)
    expected = pool.clone()
    staged = noise((len(ids), num_parts, part_size), dtype, backend.device)
    for index, block in enumerate(ids):
        expected[:, block, :part_size] = staged[index]
    block_ids = torch.tensor(ids, device=backend.device)
    backend.pick(scatter_blocks, _launch_scatter_blocks)(staged, block_ids, pool[..., :part_size])
    assert torch.equal(bits(pool), bits(expected))


def test_no_blocks(backend):
    cache = torch.zeros(2, 3, 8, device=backend.device)
    staged = torch.ones(0, 2, 8, device=backend.device)
    block_ids = torch.zeros(0, dtype=torch.int64, device=backend.device)
    backend.pick(gather_blocks, _launch_gather_blocks)(cache, block_ids, staged)
    backend.pick(scatter_blocks, _launch_scatter_blocks)(staged, block_ids, cache)
    assert not cache.any()


def test_opcheck(device):
    """Schema, mutated arguments and the fakes agree with what the ops do."""
    cache, staged = torch.randn(4, 6, 16, device=device), torch.randn(3, 4, 16, device=device)
    block_ids = torch.tensor([4, 0, 2], device=device)
    torch.library.opcheck(torch.ops.mini_infer.gather_blocks.default, (cache, block_ids, staged))
    torch.library.opcheck(torch.ops.mini_infer.scatter_blocks.default, (staged, block_ids, cache))


def test_bad_arguments():
    """Shapes, strides and dtypes that do not fit are named."""
    cache, staged, ids = torch.zeros(4, 6, 16), torch.zeros(3, 4, 16), torch.tensor([4, 0, 2])
    with pytest.raises(ValueError, match=r"cache must be \[num_parts, num_blocks, part_size\]"):
        gather_blocks(cache[0], ids, staged)
    with pytest.raises(ValueError, match=r"cache must be .* stride 1"):
        gather_blocks(torch.zeros(4, 16, 6).transpose(1, 2), ids, staged)
    with pytest.raises(ValueError, match="block_ids must be int64"):
        scatter_blocks(staged, ids.int(), cache)
    with pytest.raises(ValueError, match=r"staged must be \(2, 4, 16\)"):
        gather_blocks(cache, ids[:2], staged)
    with pytest.raises(ValueError, match=r"staged must be .* contiguous"):
        scatter_blocks(torch.zeros(4, 3, 16).transpose(0, 1), ids, cache)
    with pytest.raises(ValueError, match="staged must have the dtype of cache"):
        gather_blocks(cache, ids, staged.half())
