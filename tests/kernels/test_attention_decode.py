"""Decode attention over the paged cache."""

from dataclasses import replace

import pytest
import torch

from mini_infer.kernels import attention_decode, attention_decode_cpu, paged_attention
from mini_infer.kernels.attention_decode import DecodeConfig, _launch_paged_attention, decode_config
from mini_infer.kernels.attention_decode_cpu import paged_attention_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(backend, query, cache, scale=None, window=0):
    args = (query, cache.key_cache, cache.value_cache, cache.block_tables, cache.context_lens)
    if backend.name == "interpreter":
        return _launch_paged_attention(*args, query.shape[-1] ** -0.5 if scale is None else scale, window)
    return paged_attention(*args, scale=scale, sliding_window=window)


def expected_attention(query, cache, scale=None, window=0):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for q, keys, values in zip(query.double().cpu(), cache.keys, cache.values, strict=True):
        low = max(0, keys.shape[0] - window) if window else 0
        group = q.shape[0] // keys.shape[1]
        k, v = keys[low:].repeat_interleave(group, 1), values[low:].repeat_interleave(group, 1)
        rows.append(torch.einsum("ht,thd->hd", torch.einsum("hd,thd->ht", q * scale, k).softmax(-1), v))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,block_size",
    [(9, 3, 64, 16), (4, 4, 80, 16), (6, 1, 96, 8), (8, 2, 128, 32), (2, 1, 256, 16), (4, 2, 64, 24)],
)
def test_shapes(backend, make_cache, assert_close, heads, kv_heads, head_dim, block_size, dtype):
    lens = [1, 17, 50]
    cache = make_cache(lens, kv_heads, head_dim, block_size, dtype, backend.device)
    qkv = torch.randn(len(lens), (heads + 5) * head_dim, device=backend.device).to(dtype)
    query = qkv[:, : heads * head_dim].view(len(lens), heads, head_dim)
    out = run(backend, query, cache)
    assert out.dtype == dtype
    assert_close("out", out, expected_attention(query, cache))


@pytest.mark.parametrize("window", [0, 1, 7, 300])
def test_tiles_and_window(backend, make_cache, assert_close, window):
    """Contexts on both sides of a tile boundary, under a table that is wider than any row needs."""
    tile = decode_config(64, 4).block_n
    lens = [tile, tile + 1, 2 * tile + 40, 3]
    cache = make_cache(lens, 1, 64, 16, torch.float32, backend.device, max_blocks=4 * tile // 16)
    query = torch.randn(len(lens), 3, 64, device=backend.device)
    assert_close("out", run(backend, query, cache, window=window), expected_attention(query, cache, window=window))


def test_scale(backend, make_cache, assert_close):
    cache = make_cache([33, 5], 2, 64, 16, torch.float32, backend.device)
    query = torch.randn(2, 4, 64, device=backend.device)
    assert_close("out", run(backend, query, cache, scale=0.3), expected_attention(query, cache, scale=0.3))


def test_noise_beyond_the_context_changes_nothing(backend, make_cache):
    """NaN and infinity past each length, in unused blocks and behind wild table entries reach no output."""
    cache = make_cache([5, 40], 2, 64, 16, torch.float32, backend.device)
    query = torch.randn(2, 4, 64, device=backend.device)
    out = run(backend, query, cache)
    for pool, bad in ((cache.key_cache, float("inf")), (cache.value_cache, 1e30)):
        for seq, length in enumerate([5, 40]):
            last = int(cache.block_tables[seq, (length - 1) // 16])
            pool[last, :, length % 16 or 16 :] = bad if backend.name != "cpu" else 1e30
        pool[0] = 1e30
    cache.block_tables[0, 1:] = 2_000_000_000
    assert torch.equal(run(backend, query, cache), out)


def test_row_in_any_batch(backend, make_cache, assert_close):
    """Alone, in a batch and under a wider table: the same result, to the bit if the same batch is run again."""
    lens = [300, 3, 77]
    cache = make_cache(lens, 1, 64, 16, torch.float32, backend.device, max_blocks=40)
    query = torch.randn(3, 3, 64, device=backend.device)
    together = run(backend, query, cache)
    assert torch.equal(together, run(backend, query, cache))
    for seq in range(3):
        narrow = replace(
            cache,
            block_tables=cache.block_tables[seq : seq + 1, : 20 if seq != 0 else 33],
            context_lens=cache.context_lens[seq : seq + 1],
        )
        alone = run(backend, query[seq : seq + 1], narrow)
        assert_close(f"row {seq}", alone, together[seq : seq + 1].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize(
    "lens",
    [(1,), (200,), (1, 32, 33, 64, 200), (16,) * 9, (300, 1, 1, 1, 1, 1, 7), tuple(range(40, 1, -3))],
    ids=lambda lens: f"{len(lens)} rows",
)
def test_however_the_work_is_dealt_out(backend, make_cache, assert_close, lens, window, dtype):
    """One program for all of it, one for each tile, more programs than tiles, stretches that end anywhere."""
    if backend.name == "cpu":
        pytest.skip("Triton's way to share out the work")
    cache = make_cache(list(lens), 2, 64, 16, dtype, backend.device, max_blocks=20)
    query = torch.randn(len(lens), 6, 64, device=backend.device).to(dtype)
    args = query, cache.key_cache, cache.value_cache, cache.block_tables, cache.context_lens, 0.125, window
    expected = expected_attention(query, cache, window=window)
    tiles = 2 * sum(-(-length // 16) for length in lens)
    for programs in sorted({1, 3, max(1, tiles - 1), tiles, tiles + 5}):
        config = DecodeConfig(block_n=16, num_warps=4, num_stages=2, programs=programs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_decode, "multiprocessors", lambda device: 1)
            out = _launch_paged_attention(*args, config=config)
        assert_close(f"{programs} programs", out, expected)


def test_places_of_64_bits(backend, make_cache, assert_close, monkeypatch):
    """What a cache of more than 2 ** 31 elements takes."""
    if backend.name == "cpu":
        pytest.skip("Triton's way to find a place")
    cache = make_cache([1, 90], 2, 64, 16, torch.bfloat16, backend.device)
    query = torch.randn(2, 4, 64, device=backend.device).bfloat16()
    monkeypatch.setattr(attention_decode, "is_wide", lambda cache: True)
    assert_close("out", run(backend, query, cache), expected_attention(query, cache))


def test_caches_of_different_strides(make_cache):
    cache = make_cache([5], 1, 64, 16, torch.float32, torch.device("cpu"))
    args = cache.key_cache, cache.value_cache.contiguous(), cache.block_tables, cache.context_lens
    with pytest.raises(ValueError, match="same strides"):
        _launch_paged_attention(torch.randn(1, 2, 64), *args, 0.125, 0)


def test_config():
    for head_dim in (8, 64, 80, 128, 256):
        for element_size in (2, 4):
            config = decode_config(head_dim, element_size)
            assert config.block_n >= 16 and config.block_n & (config.block_n - 1) == 0
            assert config.block_n * head_dim * element_size <= 16 << 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_rows(make_cache, assert_close, dtype):
    """One long row among many short ones, more rows than fit the smallest kernel, and a part of them."""
    lens = [4000, 1, 256, 700] + [40] * 300
    cache = make_cache(lens, 4, 128, 16, dtype, torch.device("cuda"))
    query = torch.randn(len(lens), 16, 128, device="cuda").to(dtype)
    caches = cache.key_cache, cache.value_cache
    for rows in (1, 4, 60, 304):
        part = paged_attention(query[:rows], *caches, cache.block_tables[:rows], cache.context_lens[:rows])
        assert_close(f"{rows} rows", part, expected_attention(query, cache)[:rows])


@pytest.mark.gpu
def test_replay_follows_the_lengths(make_cache, assert_close):
    """One captured graph serves any lengths: its programs find their work in device memory."""
    cache = make_cache([900, 30, 512, 64], 2, 128, 16, torch.bfloat16, torch.device("cuda"))
    query = torch.randn(4, 8, 128, device="cuda").bfloat16()
    lens = cache.context_lens.clone()
    graph = torch.cuda.CUDAGraph()
    args = query, cache.key_cache, cache.value_cache, cache.block_tables, cache.context_lens
    paged_attention(*args)
    with torch.cuda.graph(graph):
        out = paged_attention(*args)
    for shortened in (lens, torch.ones_like(lens), lens // 2 + 1, torch.tensor([900, 1, 1, 64]), lens):
        cache.context_lens.copy_(shortened)
        graph.replay()
        keys = [key[:length] for key, length in zip(cache.keys, shortened.tolist(), strict=True)]
        values = [value[:length] for value, length in zip(cache.values, shortened.tolist(), strict=True)]
        assert_close("out", out, expected_attention(query, replace(cache, keys=keys, values=values)))


def test_cpu_groups_ragged_rows(make_cache, assert_close, monkeypatch):
    """The CPU path cuts a large batch into groups of similar length."""
    monkeypatch.setattr(attention_decode_cpu, "_GATHER_ELEMENTS", 5000)
    cache = make_cache([3, 90, 16, 1, 40, 41, 17], 2, 64, 16, torch.float32, torch.device("cpu"))
    query = torch.randn(7, 4, 64)
    for window in (0, 10):
        out = paged_attention(
            query,
            cache.key_cache,
            cache.value_cache,
            cache.block_tables,
            cache.context_lens,
            sliding_window=window,
        )
        assert_close("out", out, expected_attention(query, cache, window=window))


@pytest.mark.parametrize("num_padded", [1, 9, 300])
def test_padded_rows_give_zeros(backend, make_cache, assert_close, num_padded):
    """They take no part in sharing out the work, and whatever their tables name is not read."""
    cache = make_cache([20, 70], 1, 64, 16, torch.float32, backend.device)
    tables = torch.cat([cache.block_tables, cache.block_tables[:1].expand(num_padded, -1) + 2_000_000_000])
    lens = torch.tensor([20, 70] + [0] * num_padded, dtype=torch.int32, device=backend.device)
    query = torch.randn(2 + num_padded, 2, 64, device=backend.device)
    padded = replace(cache, block_tables=tables, context_lens=lens)
    out = run(backend, query, padded)
    assert_close("real rows", out[:2], expected_attention(query[:2], cache))
    assert not out[2:].any()
    nobody = replace(padded, block_tables=tables[2:], context_lens=lens[2:])
    assert not run(backend, query[2:], nobody).any()


def test_reference(make_cache, assert_close):
    cache = make_cache([1, 17, 50], 3, 64, 16, torch.float32, torch.device("cpu"))
    query = torch.randn(3, 9, 64)
    for window in (0, 7):
        out = paged_attention_reference(
            query,
            cache.key_cache,
            cache.value_cache,
            cache.block_tables,
            cache.context_lens,
            0.125,
            window,
        )
        assert_close("out", out, expected_attention(query, cache, window=window))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(32, 8, 128), (64, 8, 128), (8, 8, 256), (71, 1, 64)])
@pytest.mark.parametrize("window", [0, 1000])
def test_large(make_cache, assert_close, heads, kv_heads, head_dim, window, dtype):
    cache = make_cache([1, 1000, 2311, 4096], kv_heads, head_dim, 16, dtype, torch.device("cuda"))
    query = torch.randn(4, heads, head_dim, device="cuda").to(dtype)
    out = paged_attention(
        query,
        cache.key_cache,
        cache.value_cache,
        cache.block_tables,
        cache.context_lens,
        sliding_window=window,
    )
    assert_close("out", out, expected_attention(query, cache, window=window))


def test_bad_arguments():
    cache, query = torch.zeros(4, 2, 16, 64), torch.zeros(3, 4, 64)
    tables, lens = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="query must have a multiple of key_cache's 2 heads"):
        paged_attention(query[:, :3], cache, cache, tables, lens)
    with pytest.raises(ValueError, match="query has head_dim 32, key_cache has 64"):
        paged_attention(query[..., :32], cache, cache, tables, lens)
    with pytest.raises(ValueError, match=r"context_lens must be \[2\]"):
        paged_attention(query[:2], cache, cache, tables, lens)
    with pytest.raises(ValueError, match=r"block_tables must be \[num_seqs, max_blocks\]"):
        paged_attention(query, cache, cache, tables[:2], lens)
    with pytest.raises(ValueError, match="context_lens must be int32 or int64"):
        paged_attention(query, cache, cache, tables, lens.float())
    with pytest.raises(ValueError, match=r"scale must be > 0, got -0\.5"):
        paged_attention(query, cache, cache, tables, lens, scale=-0.5)
    with pytest.raises(ValueError, match="sliding_window must be >= 0"):
        paged_attention(query, cache, cache, tables, lens, sliding_window=-1)
    with pytest.raises(ValueError, match="value_cache must have the shape of key_cache"):
        paged_attention(query, cache, cache[:2], tables, lens)
    with pytest.raises(ValueError, match="key_cache must have the dtype of query"):
        paged_attention(query.half(), cache, cache, tables, lens)
