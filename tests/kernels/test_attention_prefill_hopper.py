"""The kernel for Hopper GPUs against the portable one, and which arguments it takes.

What the op computes is tested in test_attention_prefill.py; on a Hopper GPU those tests run this kernel.
"""

import pytest
import torch

from mini_infer.kernels import attention_prefill_hopper
from mini_infer.kernels.attention_prefill import _launch_paged_prefill_attention, prefill_config
from mini_infer.kernels.attention_prefill_hopper import supports


def tensors(heads=8, kv_heads=2, head_dim=128, block_size=16, dtype=torch.bfloat16):
    query = torch.zeros(3, heads, head_dim, dtype=dtype)
    caches = torch.zeros(5, 2, kv_heads, block_size, head_dim, dtype=dtype)
    return query, caches[:, 0], caches[:, 1]


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(attention_prefill_hopper, "on_hopper", lambda: True)


def test_takes_what_models_have(on_hopper):
    assert supports(*tensors())
    assert supports(*tensors(head_dim=64, dtype=torch.float16))
    assert supports(*tensors(heads=6, block_size=8))
    qkv = torch.zeros(3, 12, 128, dtype=torch.bfloat16)
    assert supports(qkv[:, :8], *tensors()[1:])


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"head_dim": 80},
        {"head_dim": 256},
        {"block_size": 24},
        {"block_size": 4},
        {"heads": 129, "kv_heads": 1},
    ],
    ids=str,
)
def test_leaves_the_rest_to_the_other_kernel(on_hopper, change):
    assert not supports(*tensors(**change))


def test_leaves_what_cannot_be_copied_16_bytes_at_a_time(on_hopper):
    query, *caches = tensors()
    odd = torch.zeros(3, 8 * 128 + 8, dtype=query.dtype)[:, : 8 * 128].view(3, 8, 128)
    assert not supports(odd, *caches)
    assert not supports(torch.zeros(3 * 8 * 128 + 1, dtype=query.dtype)[1:].view(3, 8, 128), *caches)
    shifted = torch.zeros(5 * 2 * 2 * 16 * 128 + 1, dtype=query.dtype)[1:].view(5, 2, 2, 16, 128)
    assert not supports(query, caches[0], shifted[:, 1]) and not supports(query, shifted[:, 0], caches[1])


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert not supports(*tensors())


@pytest.fixture
def pool():
    """A cache full of NaN, as two views of one tensor: [blocks, kv_heads, block_size, head_dim]."""

    def make(lens, kv_heads, head_dim, block_size, dtype):
        blocks = [-(-length // block_size) for length in lens]
        cache = torch.full(
            (sum(blocks) + 1, 2, kv_heads, block_size, head_dim), float("nan"), device="cuda", dtype=dtype
        )
        free = (torch.randperm(sum(blocks)) + 1).tolist()
        tables = torch.full((len(lens), max(blocks) + 1), 2_000_000_000)
        for seq, (length, count) in enumerate(zip(lens, blocks, strict=True)):
            for index in range(count):
                tables[seq, index] = block = free.pop()
                filled = min(block_size, length - index * block_size)
                cache[block, :, :, :filled] = torch.randn(2, kv_heads, filled, head_dim).to(cache)
        return cache[:, 0], cache[:, 1], tables.int().cuda(), torch.tensor(lens).int().cuda()

    return make


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
class TestOnHopper:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("window", [0, 100, 600])
    @pytest.mark.parametrize(
        "heads,kv_heads,head_dim,block_size",
        [(32, 8, 128, 16), (16, 8, 128, 32), (9, 3, 64, 16), (64, 1, 64, 8), (8, 8, 128, 128), (28, 4, 128, 64)],
    )
    def test_agrees_with_the_portable_kernel(self, pool, heads, kv_heads, head_dim, block_size, window, dtype):
        """Chunks of all kinds, with NaN in every place that is no token's."""
        lens = [2000, 1, 37, 512, 900, 128, 129, 127, 64, 15]
        q_lens = [300, 1, 37, 512, 1, 128, 129, 127, 0, 15]
        keys, values, tables, context = pool(lens, kv_heads, head_dim, block_size, dtype)
        query = torch.randn(sum(q_lens), heads, head_dim, device="cuda").to(dtype)
        starts = torch.tensor([0, *q_lens]).cumsum(0).int().cuda()
        arguments = query, keys, values, tables, context, starts, head_dim**-0.5, window
        assert supports(query, keys, values)
        out = _launch_paged_prefill_attention(*arguments)
        expected = _launch_paged_prefill_attention(*arguments, config=prefill_config(head_dim, 2))
        torch.testing.assert_close(out.float(), expected.float(), atol=1e-2, rtol=1e-2)
        for _ in range(3):  # whichever program draws which item
            assert torch.equal(_launch_paged_prefill_attention(*arguments), out)

    @pytest.mark.parametrize("window", [0, 200])
    def test_chunking_does_not_change_a_token(self, pool, window):
        keys, values, tables, context = pool([900], 8, 128, 16, torch.bfloat16)
        query = torch.randn(900, 32, 128, device="cuda").bfloat16()

        def attend(first, last):
            context.fill_(last)
            starts = torch.tensor([0, last - first]).int().cuda()
            return _launch_paged_prefill_attention(
                query[first:last], keys, values, tables, context, starts, 128**-0.5, window
            )

        whole = attend(0, 900)
        assert torch.equal(torch.cat([attend(0, 130), attend(130, 500), attend(500, 501), attend(501, 900)]), whole)

    @pytest.mark.parametrize("seqs", [1, 3, 200])
    def test_padding_sequences_and_long_indices(self, pool, seqs):
        """Empty sequences at the end, as in a captured step; int64 tables, lengths and starts."""
        lens = [50, *[16] * seqs]
        keys, values, tables, context = pool(lens, 2, 128, 16, torch.bfloat16)
        query = torch.randn(50, 8, 128, device="cuda").bfloat16()
        starts = torch.tensor([0, 50, *[50] * seqs]).cuda()
        arguments = query, keys, values, tables.long(), context.long(), starts, 0.1, 0
        expected = _launch_paged_prefill_attention(*arguments, config=prefill_config(128, 2))
        out = _launch_paged_prefill_attention(*arguments)
        torch.testing.assert_close(out.float(), expected.float(), atol=1e-2, rtol=1e-2)

    def test_replays_draw_anew(self, pool):
        """The count of drawn items starts at 0 in every replay."""
        lens = [700] * 12
        keys, values, tables, context = pool(lens, 8, 128, 16, torch.bfloat16)
        query = torch.randn(sum(lens), 32, 128, device="cuda").bfloat16()
        starts = torch.arange(len(lens) + 1).mul(700).int().cuda()
        arguments = query, keys, values, tables, context, starts, 128**-0.5, 0
        expected = _launch_paged_prefill_attention(*arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = _launch_paged_prefill_attention(*arguments)
        for _ in range(3):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)
