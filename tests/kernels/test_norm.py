"""RMSNorm and add + RMSNorm."""

import pytest
import torch

from mini_infer.kernels import add_rmsnorm, rmsnorm
from mini_infer.kernels.norm import _launch_add_rmsnorm, _launch_rmsnorm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 576), (3, 63), (2, 5, 100), (4, 2048), (2, 3, 2, 64)]


def expected_rmsnorm(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rmsnorm(backend, assert_close, shape, dtype):
    x = torch.randn(shape, device=backend.device).to(dtype)
    weight = torch.rand(shape[-1], device=backend.device).to(dtype)
    out = backend.pick(rmsnorm, _launch_rmsnorm)(x, weight, 1e-5)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close("out", out, expected_rmsnorm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rmsnorm(backend, assert_close, shape, dtype):
    x = torch.randn(shape, device=backend.device).to(dtype)
    residual = torch.randn(shape, device=backend.device).to(dtype)
    weight = torch.rand(shape[-1], device=backend.device).to(dtype)
    before = x.clone(), residual.clone()
    normed, new_residual = backend.pick(add_rmsnorm, _launch_add_rmsnorm)(x, residual, weight, 1e-6)
    assert_close("new_residual", new_residual, x.double() + residual.double())
    assert_close("normed", normed, expected_rmsnorm(new_residual, weight, 1e-6))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_strided_heads(backend, assert_close):
    """The q heads of a fused qkv row, and a residual with other strides than x."""
    qkv = torch.randn(5, (4 + 2 + 2) * 48, device=backend.device)
    q = qkv[:, : 4 * 48].view(5, 4, 48)
    weight = torch.rand(48, device=backend.device)
    out = backend.pick(rmsnorm, _launch_rmsnorm)(q, weight, 1e-6)
    assert_close("q", out, expected_rmsnorm(q, weight, 1e-6))
    residual = torch.randn(5, 48, 4, device=backend.device).transpose(1, 2)
    normed, new_residual = backend.pick(add_rmsnorm, _launch_add_rmsnorm)(q, residual, weight, 1e-6)
    assert_close("new_residual", new_residual, q.double() + residual.double())
    assert_close("normed", normed, expected_rmsnorm(q + residual, weight, 1e-6))


def test_strided_weight(backend, assert_close):
    x, weight = torch.randn(3, 48, device=backend.device), torch.rand(48, 2, device=backend.device)[:, 1]
    out = backend.pick(rmsnorm, _launch_rmsnorm)(x, weight, 1e-6)
    assert_close("out", out, expected_rmsnorm(x, weight, 1e-6))


def test_no_rows(backend):
    out = backend.pick(rmsnorm, _launch_rmsnorm)(
        torch.zeros(0, 64, device=backend.device), torch.ones(64, device=backend.device), 1e-6
    )
    assert out.shape == (0, 64)


def test_row_alone_equals_row_in_batch(backend):
    x = torch.randn(6, 320, device=backend.device)
    weight = torch.rand(320, device=backend.device)
    run = backend.pick(rmsnorm, _launch_rmsnorm)
    assert torch.equal(run(x, weight, 1e-6)[4:5], run(x[4:5], weight, 1e-6))


def test_one_call_after_another(backend, assert_close):
    """Kernels are launched again without being looked for; what is passed differs in all ways that matter."""
    run, run_add = backend.pick(rmsnorm, _launch_rmsnorm), backend.pick(add_rmsnorm, _launch_add_rmsnorm)
    wide = torch.randn(9, 97, device=backend.device)
    for _ in range(2):
        for x in (wide[:, :64], wide[2:3, :64], wide[:, 1:65], wide[:, :64].contiguous(), wide[:, :64].half()):
            weight = torch.rand(64, device=backend.device).to(x.dtype)
            assert_close("out", run(x, weight, 1e-6), expected_rmsnorm(x, weight, 1e-6))
            assert_close("without weight", run(x, None, 1e-2), expected_rmsnorm(x, torch.ones_like(weight), 1e-2))
            normed, new_residual = run_add(x, x, weight, 1e-6)
            assert_close("normed", normed, expected_rmsnorm(new_residual, weight, 1e-6))


@pytest.mark.gpu
def test_one_device_after_the_other(assert_close):
    x, weight = torch.randn(4, 64), torch.rand(64)
    for device in ("cuda", "cuda", "cpu", "cuda"):
        out = rmsnorm(x.to(device), weight.to(device))
        assert out.device.type == device
        assert_close(device, out.cpu(), expected_rmsnorm(x, weight, 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(assert_close, dtype):
    x = torch.randn(1000, 8192, device="cuda").to(dtype)
    weight = torch.rand(8192, device="cuda").to(dtype)
    assert_close("out", rmsnorm(x, weight), expected_rmsnorm(x, weight, 1e-6))
    normed, new_residual = add_rmsnorm(x, x, weight)
    assert_close("normed", normed, expected_rmsnorm(new_residual, weight, 1e-6))


def test_bad_arguments():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        rmsnorm(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"weight must have the dtype of x"):
        rmsnorm(x, torch.zeros(8, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"x must be float32, float16 or bfloat16"):
        rmsnorm(x.long(), torch.zeros(8).long())
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        add_rmsnorm(x, x[:1], torch.zeros(8))
