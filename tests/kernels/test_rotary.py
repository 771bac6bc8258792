"""Rotary embedding."""

import pytest
import torch

from mini_infer.kernels import apply_rotary_emb
from mini_infer.kernels.rotary import _launch_rotary

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tables(positions, half, device):
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


def expected_rotation(x, cos, sin, position_ids):
    """Hugging Face's form: x * cos + rotate_half(x) * sin with repeated tables."""
    c = torch.cat([cos, cos], -1).double()[position_ids.long()].unsqueeze(-2)
    s = torch.cat([sin, sin], -1).double()[position_ids.long()].unsqueeze(-2)
    x = x.double()
    half = x.shape[-1] // 2
    return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(9, 3, 64), (4, 4, 80), (7, 1, 96), (2, 2, 128)])
@pytest.mark.parametrize("leading", [(3,), (2, 2)], ids=str)
def test_rotary(backend, assert_close, leading, heads, kv_heads, head_dim, dtype):
    q = torch.randn(*leading, heads, head_dim, device=backend.device).to(dtype)
    k = torch.randn(*leading, kv_heads, head_dim, device=backend.device).to(dtype)
    cos, sin = tables(50, head_dim // 2, backend.device)
    positions = torch.randint(0, 50, leading, device=backend.device)
    q_out, k_out = backend.pick(apply_rotary_emb, _launch_rotary)(q, k, cos, sin, positions)
    assert q_out.dtype == k_out.dtype == dtype
    assert_close("q", q_out, expected_rotation(q, cos, sin, positions))
    assert_close("k", k_out, expected_rotation(k, cos, sin, positions))


def test_fused_qkv_views(backend, assert_close):
    qkv = torch.randn(4, (9 + 3 + 3) * 64, device=backend.device)
    before = qkv.clone()
    q, k = qkv[:, : 9 * 64].view(4, 9, 64), qkv[:, 9 * 64 : 12 * 64].view(4, 3, 64)
    cos, sin = tables(50, 32, backend.device)
    positions = torch.tensor([0, 49, 7, 7], dtype=torch.int32, device=backend.device)
    q_out, k_out = backend.pick(apply_rotary_emb, _launch_rotary)(q, k, cos, sin, positions)
    assert_close("q", q_out, expected_rotation(q, cos, sin, positions))
    assert_close("k", k_out, expected_rotation(k, cos, sin, positions))
    assert torch.equal(qkv, before)


def test_what_has_to_be_copied(backend, assert_close):
    """Heads that are not dense, leading dimensions that no view can make one of, and strided positions."""
    cos, sin = tables(50, 32, backend.device)
    wide = torch.tensor([[7, 1, 0], [49, 2, 0], [0, 3, 0]], device=backend.device)
    dense = wide[:, :2].contiguous()
    across = torch.randn(3, 2, 64, 4, device=backend.device).transpose(2, 3)
    apart = torch.randn(2, 3, 4, 64, device=backend.device).transpose(0, 1)
    plain = torch.randn(3, 2, 4, 64, device=backend.device)
    run = backend.pick(apply_rotary_emb, _launch_rotary)
    for q, k, positions in (
        (across, apart[:, :, :1], dense),
        (apart, across[:, :, :1], dense),
        (plain, plain[:, :, :1], wide[:, :2]),
        (plain[:, 0], plain[:, 0, :1], wide[:, 0]),
    ):
        q_out, k_out = run(q, k, cos, sin, positions)
        assert_close("q", q_out, expected_rotation(q, cos, sin, positions))
        assert_close("k", k_out, expected_rotation(k, cos, sin, positions))


def test_one_call_after_another(backend, assert_close):
    """Kernels are launched again without being looked for; what is passed differs in all ways that matter."""
    run = backend.pick(apply_rotary_emb, _launch_rotary)
    cos, sin = tables(50, 32, backend.device)
    wide = torch.randn(4, 5 * 64 + 1, device=backend.device)
    for _ in range(2):
        for rows, first, heads in ((4, 0, 3), (1, 0, 3), (4, 1, 3), (4, 64, 2)):
            q = wide[:rows, first : first + heads * 64].view(rows, heads, 64)
            k = wide[:rows, 256:320].view(rows, 1, 64)
            for positions in (torch.arange(rows) + 7, torch.arange(rows).int()):
                positions = positions.to(backend.device)
                q_out, k_out = run(q, k, cos, sin, positions)
                assert_close("q", q_out, expected_rotation(q, cos, sin, positions))
                assert_close("k", k_out, expected_rotation(k, cos, sin, positions))


def test_sliced_hugging_face_tables(backend, assert_close):
    """Tables cut from [max_positions, head_dim] keep a row stride of head_dim."""
    q, k = torch.randn(3, 2, 64, device=backend.device), torch.randn(3, 1, 64, device=backend.device)
    cos, sin = tables(20, 32, backend.device)
    positions = torch.tensor([3, 19, 0], device=backend.device)
    wide = torch.cat([cos, cos], -1)[..., :32], torch.cat([sin, sin], -1)[..., :32]
    q_out, _ = backend.pick(apply_rotary_emb, _launch_rotary)(q, k, *wide, positions)
    assert_close("q", q_out, expected_rotation(q, cos, sin, positions))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(assert_close, dtype):
    q, k = torch.randn(700, 64, 128, device="cuda").to(dtype), torch.randn(700, 8, 128, device="cuda").to(dtype)
    cos, sin = tables(4096, 64, "cuda")
    positions = torch.randint(0, 4096, (700,), device="cuda")
    q_out, k_out = apply_rotary_emb(q, k, cos, sin, positions)
    assert_close("q", q_out, expected_rotation(q, cos, sin, positions))
    assert_close("k", k_out, expected_rotation(k, cos, sin, positions))


def test_bad_arguments():
    q, k, positions = torch.zeros(2, 4, 64), torch.zeros(2, 2, 64), torch.zeros(2, dtype=torch.int64)
    full, half = torch.zeros(10, 64), torch.zeros(10, 32)
    with pytest.raises(ValueError, match=r"pass cos\[..., :32\]"):
        apply_rotary_emb(q, k, full, full, positions)
    with pytest.raises(ValueError, match="equal leading dimensions"):
        apply_rotary_emb(q, k[:1], half, half, positions)
    with pytest.raises(ValueError, match=r"position_ids must be \(2,\)"):
        apply_rotary_emb(q, k, half, half, positions[:1])
    with pytest.raises(ValueError, match="position_ids must be int32 or int64"):
        apply_rotary_emb(q, k, half, half, positions.float())
    with pytest.raises(ValueError, match="cos and sin must be float32"):
        apply_rotary_emb(q, k, half.half(), half.half(), positions)
