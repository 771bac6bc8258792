"""q/k norm, rotation and the write to the cache as one op."""

import pytest
import torch

from mini_infer.kernels import apply_rotary_emb, prepare_qkv, rmsnorm, store_kv
from mini_infer.kernels.kv_store import _launch_store_kv
from mini_infer.kernels.norm import _launch_rmsnorm
from mini_infer.kernels.qkv_prologue import _launch_prepare_qkv, prepare_qkv_reference
from mini_infer.kernels.rotary import _launch_rotary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def make(num_tokens, heads, kv_heads, head_dim, dtype, device, norm, block_size=16, index=torch.int64):
    """Arguments of prepare_qkv but the last two: qkv rows and the caches are views, the slots are shuffled."""
    width = (heads + 2 * kv_heads) * head_dim
    num_blocks = -(-num_tokens // block_size) + 3
    qkv = torch.randn(num_tokens, width + 8, device=device).to(dtype)[:, :width]
    weights = [torch.randn(head_dim, device=device).to(dtype) if norm else None for _ in range(2)]
    angle = torch.rand(50, head_dim // 2, device=device) * 6.3
    pool = torch.randn(2, num_blocks, kv_heads, block_size, head_dim, device=device).to(dtype)
    slots = torch.randperm((num_blocks - 1) * block_size, device=device)[:num_tokens] + block_size
    positions = torch.randint(0, 50, (num_tokens,), device=device).to(index)
    return [qkv, *weights, angle.cos(), angle.sin(), positions, pool[0], pool[1], slots.to(index)]


def compose(args, heads, launch=False):
    """What the op stands for, in the single ops or their launchers. Returns query and the caches."""
    qkv, q_norm, k_norm, cos, sin, positions, key_cache, value_cache, slots = args
    key_cache, value_cache = key_cache.clone(), value_cache.clone()
    kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    query, key, value = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)
    if q_norm is not None:
        normalise = _launch_rmsnorm if launch else rmsnorm
        query, key = normalise(query, q_norm, EPS), normalise(key, k_norm, EPS)
    query, key = (_launch_rotary if launch else apply_rotary_emb)(query, key, cos, sin, positions)
    (_launch_store_kv if launch else store_kv)(key, value, key_cache, value_cache, slots.long())
    return query, key_cache, value_cache


def compare(out, args, expected):
    """The values are equal bit for bit; sums of squares may be taken in another order, which may move a rounding."""
    query, key_cache, value_cache = expected
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[out.dtype]
    assert out.is_contiguous()
    torch.testing.assert_close(out, query, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(args[6], key_cache, atol=tolerance, rtol=tolerance)
    assert torch.equal(args[7], value_cache)
    if out.dtype != torch.float32:  # nearly all of what was rounded to few bits is the same
        assert (out == query).float().mean() > 0.99


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,block_size",
    [(4, 2, 8, 16), (9, 3, 64, 8), (4, 4, 80, 16), (7, 1, 96, 4), (32, 8, 128, 16)],
)
def test_equals_the_composition(backend, heads, kv_heads, head_dim, block_size, dtype, norm):
    args = make(5, heads, kv_heads, head_dim, dtype, backend.device, norm, block_size)
    before, expected = args[0].clone(), compose(args, heads, backend.small)
    out = backend.pick(prepare_qkv, _launch_prepare_qkv)(*args, heads, EPS)
    compare(out, args, expected)
    if backend.name == "cpu":
        assert torch.equal(out, expected[0])
        assert torch.equal(args[6], expected[1])
    assert torch.equal(args[0], before)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 70])
def test_token_counts_and_index_types(backend, num_tokens, index):
    """Both sides of the count at which programs take more heads."""
    args = make(num_tokens, 3, 1, 64, torch.float32, backend.device, True, index=index)
    expected = compose(args, 3, backend.small)
    compare(backend.pick(prepare_qkv, _launch_prepare_qkv)(*args, 3, EPS), args, expected)


def test_padded_rows_share_a_null_slot(backend):
    """Real rows are right, and nothing but their slots and the null block's changes."""
    args = make(4, 4, 2, 16, torch.float32, backend.device, True)
    args[8][1:] = 0
    args[5][1:] = 0
    key_cache, value_cache = args[6].clone(), args[7].clone()
    query, expected_key, expected_value = compose(args, 4, backend.small)
    out = backend.pick(prepare_qkv, _launch_prepare_qkv)(*args, 4, EPS)
    torch.testing.assert_close(out, query)
    torch.testing.assert_close(args[6][1:], expected_key[1:])
    assert torch.equal(args[7][1:], expected_value[1:])
    assert torch.equal(args[6][0, :, 1:], key_cache[0, :, 1:])
    assert torch.equal(args[7][0, :, 1:], value_cache[0, :, 1:])


def test_row_does_not_depend_on_the_batch(backend):
    """Alone and among enough tokens for the larger programs: bit-equal."""
    args = make(70, 5, 2, 64, torch.bfloat16, backend.device, True)
    call = backend.pick(prepare_qkv, _launch_prepare_qkv)
    together = call(*args, 5, EPS)
    key_cache = args[6].clone()
    for row in (0, 69):
        alone = [args[0][row : row + 1], *args[1:5], args[5][row : row + 1], *args[6:8], args[8][row : row + 1]]
        assert torch.equal(call(*alone, 5, EPS)[0], together[row])
    assert torch.equal(args[6], key_cache)


def test_reference():
    args = make(5, 9, 3, 64, torch.float32, torch.device("cpu"), True)
    query, key_cache, value_cache = compose(args, 9)
    assert torch.equal(prepare_qkv_reference(*args, 9, EPS), query)
    assert torch.equal(args[6], key_cache)
    assert torch.equal(args[7], value_cache)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "num_tokens,heads,kv_heads,head_dim", [(3000, 32, 8, 128), (700, 16, 8, 128), (300, 14, 2, 64)]
)
def test_large(num_tokens, heads, kv_heads, head_dim, dtype, norm):
    args = make(num_tokens, heads, kv_heads, head_dim, dtype, torch.device("cuda"), norm)
    expected = compose(args, heads)
    compare(prepare_qkv(*args, heads, EPS), args, expected)


def test_bad_arguments():
    args = make(2, 4, 2, 8, torch.float32, torch.device("cpu"), True)

    def call(heads=4, **changes):
        names = ["qkv", "q_norm", "k_norm", "cos", "sin", "positions", "key_cache", "value_cache", "slot_mapping"]
        prepare_qkv(**(dict(zip(names, args, strict=True)) | changes), num_heads=heads)

    with pytest.raises(ValueError, match=r"qkv must be \[num_tokens, 72\] \(5 \+ 2 \* 2 heads of 8\)"):
        call(heads=5)
    with pytest.raises(ValueError, match="both or neither"):
        call(k_norm=None)
    with pytest.raises(ValueError, match=r"q_norm must be \[8\]"):
        call(q_norm=torch.ones(4))
    with pytest.raises(ValueError, match="k_norm must have the dtype of qkv"):
        call(k_norm=torch.ones(8).half())
    with pytest.raises(ValueError, match=r"cos and sin must both be \[max_positions, 4\]"):
        call(cos=torch.ones(50, 8), sin=torch.ones(50, 8))
    with pytest.raises(ValueError, match="cos and sin must be float32"):
        call(cos=args[3].half())
    with pytest.raises(ValueError, match=r"positions must be \[2\]"):
        call(positions=args[5][:1])
    with pytest.raises(ValueError, match="slot_mapping must be int32 or int64"):
        call(slot_mapping=args[8].float())
    with pytest.raises(ValueError, match="qkv must have the dtype of key_cache"):
        call(qkv=args[0].half())
