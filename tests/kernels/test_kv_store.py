"""Writing K/V into the paged cache."""

import pytest
import torch

from mini_infer.kernels import store_kv
from mini_infer.kernels.kv_store import _launch_store_kv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads,head_dim,block_size", [(3, 64, 16), (1, 80, 8), (5, 96, 32)])
def test_store(backend, kv_heads, head_dim, block_size, dtype):
    """Exactly the named slots change, bit for bit, in caches and K/V that are views."""
    num_blocks, num_tokens = 6, 7
    pool = torch.randn(2, num_blocks, kv_heads, block_size, head_dim, device=backend.device).to(dtype)
    qkv = torch.randn(num_tokens, 3 * kv_heads * head_dim, device=backend.device).to(dtype)
    key = qkv[:, kv_heads * head_dim : 2 * kv_heads * head_dim].view(num_tokens, kv_heads, head_dim)
    value = qkv[:, 2 * kv_heads * head_dim :].view(num_tokens, kv_heads, head_dim)
    slots = torch.randperm(num_blocks * block_size, device=backend.device)[:num_tokens]
    expected = pool.clone()
    for token, slot in enumerate(slots.tolist()):
        expected[0, slot // block_size, :, slot % block_size] = key[token]
        expected[1, slot // block_size, :, slot % block_size] = value[token]
    backend.pick(store_kv, _launch_store_kv)(key, value, pool[0], pool[1], slots)
    assert torch.equal(pool, expected)


def test_padded_rows_share_a_null_slot(backend):
    pool = torch.zeros(2, 3, 2, 4, 16, device=backend.device)
    kv = torch.randn(4, 2, 16, device=backend.device)
    slots = torch.tensor([5, 0, 0, 0], device=backend.device)
    backend.pick(store_kv, _launch_store_kv)(kv, kv, pool[0], pool[1], slots)
    assert torch.equal(pool[0, 1, :, 1], kv[0])
    # Whoever writes last, element by element: several programs write there at once.
    assert (pool[0, 0, :, 0] == kv[1:]).any(0).all()
    pool[:, 0, :, 0] = 0
    pool[:, 1, :, 1] = 0
    assert not pool.any()


def test_bad_arguments():
    cache, kv, slots = torch.zeros(2, 3, 4, 8), torch.zeros(5, 3, 8), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"key must be \[num_tokens, 3, 8\]"):
        store_kv(kv[:, :2], kv[:, :2], cache, cache, slots)
    with pytest.raises(ValueError, match="value must have the shape of key"):
        store_kv(kv, kv[:4], cache, cache, slots)
    with pytest.raises(ValueError, match="slot_mapping must be int64"):
        store_kv(kv, kv, cache, cache, slots.int())
    with pytest.raises(ValueError, match=r"slot_mapping must be \[5\]"):
        store_kv(kv, kv, cache, cache, slots[:4])
    with pytest.raises(ValueError, match="key must have the dtype of key_cache"):
        store_kv(kv.half(), kv.half(), cache, cache, slots)
