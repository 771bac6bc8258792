"""Packed, chunked prefill attention over the paged cache."""

import pytest
import torch

from mini_infer.kernels import attention_prefill, paged_attention, paged_prefill_attention
from mini_infer.kernels.attention_prefill import PrefillConfig, _launch_paged_prefill_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(backend, query, cache, q_lens, scale=None, window=0):
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(device=query.device, dtype=torch.int32)
    args = (query, cache.key_cache, cache.value_cache, cache.block_tables, cache.context_lens, starts)
    if backend.name == "interpreter":
        return _launch_paged_prefill_attention(*args, query.shape[-1] ** -0.5 if scale is None else scale, window)
    return paged_prefill_attention(*args, scale=scale, sliding_window=window)


def expected_attention(query, cache, q_lens, scale=None, window=0):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outs, first = [], 0
    for q_len, keys, values in zip(q_lens, cache.keys, cache.values, strict=True):
        q = query[first : first + q_len].double().cpu()
        first += q_len
        length = keys.shape[0]
        group = q.shape[1] // keys.shape[1]
        scores = torch.einsum("qhd,thd->hqt", q * scale, keys.repeat_interleave(group, 1))
        position = torch.arange(length - q_len, length)[:, None]
        target = torch.arange(length)[None, :]
        hidden = target > position
        if window:
            hidden |= target <= position - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqt,thd->qhd", weights, values.repeat_interleave(group, 1)))
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,block_size",
    [(9, 3, 64, 16), (2, 2, 80, 16), (6, 1, 96, 8), (4, 1, 128, 32), (2, 1, 256, 16), (4, 2, 64, 24)],
)
def test_shapes(backend, make_cache, assert_close, heads, kv_heads, head_dim, block_size, dtype):
    """A first chunk, a later chunk, a prefix hit with one token left, and a row with no query tokens."""
    lens, q_lens = [19, 50, 33, 12, 9], [19, 21, 1, 0, 9]
    cache = make_cache(lens, kv_heads, head_dim, block_size, dtype, backend.device)
    qkv = torch.randn(sum(q_lens), (heads + 5) * head_dim, device=backend.device).to(dtype)
    query = qkv[:, : heads * head_dim].view(sum(q_lens), heads, head_dim)
    out = run(backend, query, cache, q_lens)
    assert out.dtype == dtype
    assert_close("out", out, expected_attention(query, cache, q_lens))


def test_places_of_64_bits(backend, make_cache, assert_close, monkeypatch):
    """What a cache of more than 2 ** 31 elements takes."""
    if backend.name == "cpu":
        pytest.skip("Triton's way to find a place")
    lens, q_lens = [40, 90], [40, 3]
    cache = make_cache(lens, 2, 64, 16, torch.bfloat16, backend.device)
    query = torch.randn(sum(q_lens), 4, 64, device=backend.device).bfloat16()
    monkeypatch.setattr(attention_prefill, "is_wide", lambda cache: True)
    assert_close("out", run(backend, query, cache, q_lens), expected_attention(query, cache, q_lens))


def test_caches_of_different_strides(make_cache):
    cache = make_cache([5], 1, 64, 16, torch.float32, torch.device("cpu"))
    caches = cache.key_cache, cache.value_cache.contiguous()
    starts = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="same strides"):
        _launch_paged_prefill_attention(
            torch.randn(5, 2, 64), *caches, cache.block_tables, cache.context_lens, starts, 0.125, 0
        )


@pytest.mark.parametrize("window", [1, 5, 40])
def test_window(backend, make_cache, assert_close, window):
    lens, q_lens = [90, 7, 64], [50, 7, 3]
    cache = make_cache(lens, 1, 64, 16, torch.float32, backend.device)
    query = torch.randn(sum(q_lens), 3, 64, device=backend.device)
    out = run(backend, query, cache, q_lens, window=window)
    assert_close("out", out, expected_attention(query, cache, q_lens, window=window))


@pytest.mark.parametrize("q_lens", [[1], [0, 0, 5], [5, 0, 0], [1] * 12, [32, 32], [33, 31], [0, 1, 0, 64, 0]], ids=str)
def test_tiling(backend, make_cache, assert_close, q_lens):
    """Every way for tiles to start and end; an output row left unwritten would be NaN."""
    cache = make_cache([q + 3 for q in q_lens], 1, 64, 16, torch.float32, backend.device)
    query = torch.randn(sum(q_lens), 1, 64, device=backend.device)
    assert_close(
        "out", run(backend, query, cache, q_lens, scale=0.2), expected_attention(query, cache, q_lens, scale=0.2)
    )


def test_noise_beyond_the_context_changes_nothing(backend, make_cache):
    cache = make_cache([5, 40], 2, 64, 16, torch.float32, backend.device)
    query = torch.randn(15, 4, 64, device=backend.device)
    out = run(backend, query, cache, [5, 10])
    for pool in (cache.key_cache, cache.value_cache):
        for seq, length in enumerate([5, 40]):
            last = int(cache.block_tables[seq, (length - 1) // 16])
            pool[last, :, length % 16 or 16 :] = float("nan") if backend.name != "cpu" else 1e30
        pool[0] = 1e30
    cache.block_tables[0, 1:] = 2_000_000_000
    assert torch.equal(run(backend, query, cache, [5, 10]), out)


def test_chunking_does_not_change_a_token(backend, make_cache):
    """One chunk or three: bit-equal on a GPU (the interpreter's products are numpy's, in an order of BLAS's own)."""
    cache = make_cache([60], 1, 64, 16, torch.float32, backend.device)
    query = torch.randn(60, 3, 64, device=backend.device)
    whole = run(backend, query, cache, [60])
    parts = []
    for first, last in ((0, 13), (13, 50), (50, 60)):
        cache.context_lens[0] = last
        parts.append(run(backend, query[first:last], cache, [last - first]))
    if backend.name == "cuda":
        assert torch.equal(torch.cat(parts), whole)
    else:
        torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("window", [0, 20])
def test_full_and_masked_tiles(backend, make_cache, assert_close, window):
    """Contexts of many small tiles, most of them seen whole, and chunks that start anywhere in a tile."""
    if backend.name == "cpu":
        pytest.skip("Triton's tiles")
    lens, q_lens = [70, 47, 48, 49], [70, 15, 16, 1]
    cache = make_cache(lens, 2, 64, 8, torch.float32, backend.device)
    query = torch.randn(sum(q_lens), 4, 64, device=backend.device)
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(device=backend.device, dtype=torch.int32)
    args = query, cache.key_cache, cache.value_cache, cache.block_tables, cache.context_lens, starts, 0.125, window
    expected = expected_attention(query, cache, q_lens, window=window)
    for block_m, block_n in ((16, 16), (32, 16), (16, 32)):
        config = PrefillConfig(block_m, block_n, num_warps=4, num_stages=2)
        assert_close("out", _launch_paged_prefill_attention(*args, config=config), expected)


def test_single_tokens_agree_with_decode(make_cache):
    cache = make_cache([1, 30, 17], 2, 64, 16, torch.float32, torch.device("cpu"))
    query = torch.randn(3, 4, 64)
    args = (cache.key_cache, cache.value_cache, cache.block_tables, cache.context_lens)
    starts = torch.arange(4, dtype=torch.int32)
    torch.testing.assert_close(paged_prefill_attention(query, *args, starts), paged_attention(query, *args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(32, 8, 128), (64, 8, 128), (8, 8, 256), (71, 1, 64)])
@pytest.mark.parametrize("window", [0, 300])
def test_large(make_cache, assert_close, heads, kv_heads, head_dim, window, dtype):
    lens, q_lens = [1000, 1500, 777, 1], [1000, 300, 1, 1]
    cache = make_cache(lens, kv_heads, head_dim, 16, dtype, torch.device("cuda"))
    query = torch.randn(sum(q_lens), heads, head_dim, device="cuda").to(dtype)
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(device="cuda", dtype=torch.int32)
    out = paged_prefill_attention(
        query,
        cache.key_cache,
        cache.value_cache,
        cache.block_tables,
        cache.context_lens,
        starts,
        sliding_window=window,
    )
    assert_close("out", out, expected_attention(query, cache, q_lens, window=window))


def test_bad_arguments():
    cache, query = torch.zeros(4, 2, 16, 64), torch.zeros(3, 4, 64)
    tables, lens = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"query_start_loc must be \[3\]"):
        paged_prefill_attention(query, cache, cache, tables, lens, lens)
    with pytest.raises(ValueError, match="query_start_loc must be int32 or int64"):
        paged_prefill_attention(query, cache, cache, tables, lens, torch.zeros(3))
    starts = torch.tensor([0, 1, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="scale must be > 0, got 0"):
        paged_prefill_attention(query, cache, cache, tables, lens, starts, scale=0)
