"""SiLU and multiply."""

import pytest
import torch

from mini_infer.kernels import silu_and_mul
from mini_infer.kernels.activation import _launch_normed_silu_and_mul, _launch_silu_and_mul, normed_silu_and_mul


def expected_silu_and_mul(x):
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 2 * 1536), (3, 2 * 63), (2, 2, 2 * 100), (2, 8)], ids=str)
def test_silu_and_mul(backend, assert_close, shape, dtype):
    x = (torch.randn(shape, device=backend.device) * 3).to(dtype)
    out = backend.pick(silu_and_mul, _launch_silu_and_mul)(x)
    assert out.dtype == dtype
    assert_close("out", out, expected_silu_and_mul(x))


def test_strided_rows_and_extremes(backend, assert_close):
    x = torch.randn(4, 300, device=backend.device)[:, :128] * 100
    x[0, 0], x[0, 1] = -200.0, 200.0
    assert_close("out", backend.pick(silu_and_mul, _launch_silu_and_mul)(x), expected_silu_and_mul(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 5, 16])
def test_normed_silu_and_mul(backend, assert_close, parts, dtype):
    """Rows of x that are still to be divided by the root mean square of what they were projected from."""
    x = (torch.randn(3, 2 * 100, device=backend.device) * 30).to(dtype)
    squares = torch.rand(parts, 3, device=backend.device) * 1000
    out = backend.pick(normed_silu_and_mul, _launch_normed_silu_and_mul)(x, squares, 64, 1e-5)
    rms = (squares.double().sum(0) / 64 + 1e-5).sqrt()
    assert_close("out", out, expected_silu_and_mul(x.double() / rms[:, None]))


def test_odd_width():
    for squares in (torch.zeros(4, 3), torch.zeros(4, 2).double(), torch.zeros(2, 4).T):
        with pytest.raises(ValueError, match=r"squares must be float32 \[parts, 2\]"):
            normed_silu_and_mul(torch.zeros(2, 4), squares, 4, 1e-5)
    with pytest.raises(ValueError, match="even last dimension"):
        silu_and_mul(torch.zeros(2, 3))
