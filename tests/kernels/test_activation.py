"""SiLU and multiply."""

import pytest
import torch

from mini_infer.kernels import silu_and_mul
from mini_infer.kernels.activation import _launch_silu_and_mul


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


def test_odd_width():
    with pytest.raises(ValueError, match="even last dimension"):
        silu_and_mul(torch.zeros(2, 3))
