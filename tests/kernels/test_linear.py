"""The projections: packed CPU weights, what lies beside a product, and the plan that chooses a kernel for it."""

import dataclasses

import pytest
import torch

from mini_infer.kernels import LinearWeight, pack_linear, rmsnorm
from mini_infer.kernels.linear import add_linear, can_pack, fold_norm, linear, norm_linear, with_tiles
from mini_infer.kernels.linear_plan import M_BUCKETS, LinearPlan, Tile
from tests.kernels.products import EPS, expected_product, make_product


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


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_with_what_lies_beside_the_product(assert_close, packed, bias):
    x, weight, bias = make_product(3, 48, 64, torch.float32, "cpu", bias)
    projection = LinearWeight.from_tensors(weight, bias)
    projection = pack_linear(projection) if packed else projection
    assert_close("plain", linear(x, projection), expected_product(x, weight, bias))
    assert_close("norm", norm_linear(x, None, EPS, projection), expected_product(x, weight, bias, False, normed=True))
    gated = norm_linear(x, None, EPS, projection, gated=True)
    assert_close("gate", gated, expected_product(x, weight, bias, True, normed=True))
    for rows in (x, x[None]):
        residual = torch.randn(*rows.shape[:-1], 48)
        expected = residual.double() + expected_product(rows, weight, bias)
        assert add_linear(residual, rows, projection) is None
        assert_close("add", residual, expected)
    with pytest.raises(ValueError, match=r"residual must be \(3, 48\)"):
        add_linear(torch.zeros(2, 48), x, projection)


def test_attached_tiles_are_used(assert_close):
    """Below the last row count through our ops, above it through the library, with the same result."""
    x, weight, bias = make_product(300, 48, 64, torch.float32, "cpu")
    plan = LinearPlan()
    tiled = {
        role: dataclasses.replace(LinearWeight.from_tensors(weight, bias), tiles=plan.tiles(48, 64, role))
        for role in ("plain", "norm", "norm_gate", "add")
    }

    def plain(x):
        return linear(x, tiled["plain"])

    def normed(x):
        return norm_linear(x, None, EPS, tiled["norm"])

    def gated(x):
        return norm_linear(x, None, EPS, tiled["norm_gate"], gated=True)

    def added(x):
        residual = torch.ones(x.shape[0], 48)
        add_linear(residual, x, tiled["add"])
        return residual

    for m in (1, 9, 300):
        assert_close("plain", plain(x[:m]), expected_product(x[:m], weight, bias))
        assert_close("norm", normed(x[:m]), expected_product(x[:m], weight, bias, False, normed=True))
        assert_close("gate", gated(x[:m]), expected_product(x[:m], weight, bias, True, normed=True))
        assert_close("add", added(x[:m]), 1 + expected_product(x[:m], weight, bias))

    def names(function, rows):
        graph = torch.export.export(Wrapped(function), (rows,)).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    assert names(plain, x[:1]) == ["mini_infer.skinny_linear.default"]
    assert names(plain, x) == ["aten.linear.default"]
    assert names(normed, x[:1]) == ["mini_infer.norm_linear.default"]
    assert names(normed, x[:8]) == ["mini_infer.rmsnorm.default", "mini_infer.skinny_linear.default"]
    assert names(normed, x) == ["mini_infer.rmsnorm.default", "aten.linear.default"]
    assert names(gated, x[:1]) == ["mini_infer.norm_linear.default"]
    assert names(gated, x)[1:] == ["aten.linear.default", "mini_infer.silu_and_mul.default"]
    assert "mini_infer.add_linear.default" in names(added, x[:1])
    assert "mini_infer.add_linear.default" not in names(added, x)
    with pytest.raises(ValueError, match=r"x must be \[..., 64\]"):
        gated(x[:, :60])


class Wrapped(torch.nn.Module):
    """A function of this module as something that torch.export takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_squares_go_from_product_to_product(assert_close):
    """A tma tile norms with the squares that the product before left; without them a kernel norms first."""
    _, weight, _ = make_product(5, 64, 64, torch.float32, "cpu")
    plain = Tile("tma", 64, 64, 4, block_m=16)
    tiled = {
        norms: dataclasses.replace(
            LinearWeight.from_tensors(weight),
            tiles=(dataclasses.replace(plain, norms=norms, leaves=not norms),) * len(M_BUCKETS),
        )
        for norms in (False, True)
    }

    def chained(x):
        hidden = torch.zeros_like(x)
        squares = add_linear(hidden, x, tiled[False])
        return norm_linear(hidden, squares, EPS, tiled[True])

    def alone(x):
        return norm_linear(x, None, EPS, tiled[True])

    x = torch.randn(5, 64)
    assert_close("alone", alone(x), expected_product(x, weight, None, normed=True))
    assert_close("chained", chained(x), expected_product(expected_product(x, weight, None), weight, None, normed=True))
    graph = torch.export.export(Wrapped(chained), (x,)).graph
    calls = [node for node in graph.nodes if "mini_infer" in str(node.target)]
    assert [str(node.target) for node in calls] == ["mini_infer.add_linear.default", "mini_infer.norm_linear.default"]
    assert calls[1].args[1] is calls[0] or calls[1].args[1].args[0] is calls[0]
    graph = torch.export.export(Wrapped(alone), (x,)).graph
    calls = [str(node.target) for node in graph.nodes if "mini_infer" in str(node.target)]
    assert calls == ["mini_infer.rmsnorm.default", "mini_infer.skinny_linear.default"]


def test_a_folded_norm_is_the_norm(assert_close):
    """The weight of a norm, multiplied into the product's: the same as the norm first."""
    x, weight, bias = make_product(5, 48, 64, torch.float32, "cpu")
    norm = 1 + 0.3 * torch.randn(64)
    expected = rmsnorm(x, norm, EPS).double() @ weight.double().T + bias.double()
    projection = LinearWeight.from_tensors(fold_norm(weight.clone(), norm), bias)
    assert_close("folded", norm_linear(x, None, EPS, projection), expected)


def test_cpu_weights_get_no_tiles():
    weight = LinearWeight.from_tensors(torch.randn(8, 4))
    assert with_tiles(weight, LinearPlan(), "add") is weight
    packed = pack_linear(weight)
    assert with_tiles(packed, LinearPlan(), "add") is packed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16, 31, 64, 100, 192, 250])
def test_plan_on_the_gpu(assert_close, m, dtype):
    """The choices for real shapes and for others, by the rule and by the shipped plan of this GPU."""
    torch.manual_seed(0)
    for n, k in ((6144, 1024), (1024, 3072), (4096, 14336), (4098, 4096)):
        x, weight, _ = make_product(m, n, k, dtype, "cuda", bias=False)
        residual = torch.randn(m, n, device="cuda").to(dtype)
        for plan in (LinearPlan(), LinearPlan.for_gpu(torch.cuda.get_device_name())):
            plain = LinearWeight.from_tensors(weight)
            tiled = {role: with_tiles(plain, plan, role) for role in ("plain", "norm", "norm_gate", "add")}
            assert all(len(weight.tiles) == len(M_BUCKETS) for weight in tiled.values())
            assert_close(f"plain {n}x{k}", linear(x, tiled["plain"]), expected_product(x, weight, None))
            out = norm_linear(x, None, EPS, tiled["norm"])
            assert_close(f"norm {n}x{k}", out, expected_product(x, weight, None, False, normed=True))
            out = norm_linear(x, None, EPS, tiled["norm_gate"], gated=True)
            assert_close(f"gate {n}x{k}", out, expected_product(x, weight, None, True, normed=True))
            out = residual.clone()
            add_linear(out, x, tiled["add"])
            assert_close(f"add {n}x{k}", out, residual.double() + expected_product(x, weight, None))
