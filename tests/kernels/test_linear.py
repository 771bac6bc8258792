"""The matrix product and its packed CPU weights."""

import pytest
import torch

from mini_infer.kernels import LinearWeight, pack_linear
from mini_infer.kernels.linear import can_pack, linear


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (33,), (0,)], ids=str)
def test_packed_equals_plain(assert_close, rows, bias):
    weight = LinearWeight.from_tensors(torch.randn(96, 70), torch.randn(96) if bias else None)
    packed = pack_linear(weight)
    assert (packed.weight is None) == can_pack(weight.weight)
    x = torch.randn(*rows, 70)
    out = linear(x, packed)
    assert out.shape == (*rows, 96)
    if x.numel():
        expected = x.double() @ weight.weight.double().T + (weight.bias.double() if bias else 0.0)
        assert_close("packed", out, expected)
        assert_close("plain", linear(x, weight), expected)


def test_strided_rows(assert_close):
    weight = torch.randn(32, 64)
    x = torch.randn(5, 200)[:, 10:74]
    assert_close("out", linear(x, pack_linear(LinearWeight.from_tensors(weight))), x.double() @ weight.double().T)


def test_other_dtypes_stay_plain():
    weight = LinearWeight.from_tensors(torch.randn(8, 4, dtype=torch.bfloat16))
    assert pack_linear(weight) is weight
    assert linear(torch.ones(2, 4, dtype=torch.bfloat16), weight).dtype == torch.bfloat16
    packed = pack_linear(LinearWeight.from_tensors(torch.randn(8, 4)))
    assert pack_linear(packed) is packed


def test_bad_arguments():
    weight = LinearWeight.from_tensors(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"x must be \[..., 4\]"):
        linear(torch.zeros(2, 5), weight)
    with pytest.raises(ValueError, match=r"weight must be \[out_features, in_features\]"):
        LinearWeight.from_tensors(torch.randn(8, 4), torch.randn(4))
