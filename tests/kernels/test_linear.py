"""The matrix product: packed CPU weights, skinny GPU kernels, and the plan that chooses among them."""

import dataclasses
import itertools

import pytest
import torch

from mini_infer.kernels import LinearWeight, pack_linear, rmsnorm
from mini_infer.kernels.common import INTERPRET
from mini_infer.kernels.linear import add_linear, can_pack, fold_norm, linear, norm_linear, with_tiles
from mini_infer.kernels.linear_plan import (
    M_BUCKETS,
    MAX_NORMED_ROWS,
    MOST_PARTS,
    REDUCED_COLUMNS,
    LinearPlan,
    Tile,
    square_parts,
)
from mini_infer.kernels.skinny_linear import launch_add_linear, launch_skinny_linear

GEMV_TILES = [
    Tile("gemv", 2, 256, num_warps=4),
    Tile("gemv", 4, 32, num_warps=2, num_stages=3),
    Tile("gemv", 8, 64, num_warps=8),
]
DOT_TILES = [
    Tile("dot", 16, 64, num_warps=2, num_stages=3),
    Tile("dot", 32, 32, num_warps=4, num_stages=4),
    Tile("dot", 32, 32, num_warps=2, num_stages=2, split_k=3),
    Tile("dot", 16, 16, num_warps=2, num_stages=3, split_k=8),
    Tile("dot", 16, 128, num_warps=4),
    Tile("dot", 16, 64, num_warps=2, split_k=2),
]
TMA_TILES = [
    Tile("tma", 128, 64, num_warps=4, num_stages=3, block_m=16),
    Tile("tma", 128, 32, num_warps=8, num_stages=2, block_m=32),
    Tile("tma", 128, 32, num_warps=4, num_stages=3, block_m=64, split_k=2),
    Tile("tma", 64, 64, num_warps=4, num_stages=2, block_m=16, split_k=3),
]


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


EPS = 1e-5
NORM_TILES = [dataclasses.replace(tile, norms=True) for tile in GEMV_TILES + DOT_TILES + TMA_TILES if tile.split_k == 1]


def squares_of(x, parts=5):
    """Sums of squares of the rows of x in unequal parts, [parts, rows]."""
    cuts = [x.shape[-1] * part**2 // parts**2 for part in range(parts + 1)]
    return torch.stack([x[:, a:b].float().square().sum(-1) for a, b in itertools.pairwise(cuts)])


def make_product(m, n, k, dtype, device, bias=True):
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    return x, weight, torch.randn(n, device=device).to(dtype) if bias else None


def expected_product(x, weight, bias, gated=False, normed=False):
    x = x.double()
    if normed:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    both = x @ weight.double().T
    if bias is not None:
        both = both + bias.double()
    if not gated:
        return both
    gate, up = both.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request):
    """Where the Triton kernels themselves run."""
    if request.param == "interpreter" and not INTERPRET:
        pytest.skip("Triton is compiled in this process")
    torch.manual_seed(0)
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def odd_cases(tile):
    """(m, n, k, bias): odd row counts, weight rows and columns that no tile divides, and ones that all divide."""
    cases = [(1, 38, 72, True), (3, 70, 100, False), (4, 64, 128, True)]
    if tile.kind == "dot":
        cases[2:] = [(17, 64, 128, True), (33, 38, 40, False)]
    if tile.kind == "tma":  # rows that begin at multiples of 16 bytes in every type
        return [(1, 38, 72, True), (19, 300, 104, False), (66, 128, 128, True)]
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", GEMV_TILES + DOT_TILES + TMA_TILES, ids=str)
def test_tiles(kernel_device, assert_close, tile, gated, dtype):
    for m, n, k, bias in odd_cases(tile):
        product = make_product(m, n, k, dtype, kernel_device, bias)
        out = launch_skinny_linear(*product, tile, gated=gated)
        assert out.dtype == dtype
        assert_close(f"{m}x{n}x{k}", out, expected_product(*product, gated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", NORM_TILES, ids=str)
def test_tiles_norm_their_input(kernel_device, assert_close, tile, gated, dtype):
    for m, n, k, bias in odd_cases(tile):
        m = min(m, MAX_NORMED_ROWS) if tile.kind == "dot" else m
        x, weight, bias = make_product(m, n, k, dtype, kernel_device, bias)
        x *= torch.logspace(-2, 2, m, device=kernel_device).to(dtype)[:, None]
        out = launch_skinny_linear(x, weight, bias, tile, gated=gated, eps=EPS, squares=squares_of(x))
        assert_close(f"{m}x{n}x{k}", out, expected_product(x, weight, bias, gated, normed=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", GEMV_TILES + DOT_TILES + TMA_TILES, ids=str)
def test_tiles_add_to_a_residual(kernel_device, assert_close, tile, dtype):
    tile = dataclasses.replace(tile, leaves=tile.kind != "gemv")
    for m, n, k, bias in odd_cases(tile):
        product = make_product(m, n, k, dtype, kernel_device, bias)
        residual = torch.randn(m, n, device=kernel_device).to(dtype)
        expected = residual.double() + expected_product(*product)
        squares = launch_add_linear(residual, *product, tile)
        assert_close(f"{m}x{n}x{k}", residual, expected)
        assert squares.shape == (square_parts(tile, n), m)
        if len(squares):
            columns = REDUCED_COLUMNS if tile.split_k > 1 else tile.block_n
            padded = torch.nn.functional.pad(residual.double().square(), (0, columns * len(squares) - n))
            assert_close("squares", squares, padded.view(m, -1, columns).sum(-1).T, 1e-5)


@pytest.mark.parametrize("tile", [GEMV_TILES[1], DOT_TILES[0], DOT_TILES[2], TMA_TILES[0]], ids=str)
def test_tiles_take_any_rows(kernel_device, assert_close, tile):
    """Leading dimensions, strided rows, a weight that is a view, no rows at all; nothing is written past the end."""
    _, weight, bias = make_product(1, 200, 96, torch.float32, kernel_device)
    weight, bias = weight[3:53, 8:72], bias[3:53]
    x = torch.randn(2, 5, 96, device=kernel_device)[:, 1:3, :64]
    out = launch_skinny_linear(x, weight, bias, tile, gated=False)
    assert_close("leading", out, expected_product(x, weight, bias, False))
    strided = torch.randn(3, 96, device=kernel_device)[:, 16:80]
    assert_close(
        "strided",
        launch_skinny_linear(strided, weight, bias, tile, gated=True),
        expected_product(strided, weight, bias, True),
    )
    assert launch_skinny_linear(strided[:0], weight, bias, tile, gated=True).shape == (0, 25)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", [*GEMV_TILES[:2], *DOT_TILES, *TMA_TILES, *NORM_TILES[1::3]], ids=str)
def test_rows_do_not_see_each_other(kernel_device, tile, gated):
    """A row's result has the same bits again, in another place, and beside other rows."""
    x, weight, bias = make_product(4, 70, 104, torch.bfloat16, kernel_device)

    def product(x):
        return launch_skinny_linear(x, weight, bias, tile, gated=gated, eps=EPS, squares=squares_of(x))

    out = product(x)
    assert torch.equal(out, product(x))
    assert torch.equal(out.flip(0), product(x.flip(0)))
    assert torch.equal(out[:2], product(torch.cat([x[:2], torch.randn_like(x[2:])]))[:2])


def test_tiles_refuse_what_they_cannot_do():
    x, weight, _ = make_product(5, 32, 32, torch.float32, "cpu")
    with pytest.raises(ValueError, match="does not do 5 rows"):
        launch_skinny_linear(x, weight, None, GEMV_TILES[0], gated=False)
    with pytest.raises(ValueError, match="gated: True"):
        launch_skinny_linear(x[:1], weight[:31], None, GEMV_TILES[0], gated=True)
    with pytest.raises(ValueError, match="no tile that norms"):
        launch_add_linear(torch.zeros(5, 32), x, weight, None, Tile("dot", 16, 64, 4, norms=True))
    with pytest.raises(ValueError, match="at most 32 rows, got 33"):
        launch_skinny_linear(x.repeat(7, 1)[:33], weight, None, Tile("dot", 16, 64, 4, norms=True), eps=EPS)
    for tile, changes in ((GEMV_TILES[0], {}), (TMA_TILES[0], {"norms": True}), (Tile("whole"), {})):
        with pytest.raises(ValueError, match="leaves squares"):
            dataclasses.replace(tile, leaves=True, **changes)
    with pytest.raises(ValueError, match="share the columns cannot norm"):
        Tile("dot", 16, 64, 2, split_k=2, norms=True)
    normed = Tile("tma", 64, 64, 4, block_m=16, norms=True)
    with pytest.raises(ValueError, match="there are none"):
        launch_skinny_linear(x, weight, None, normed, eps=EPS)
    for squares in (torch.zeros(3, 4), torch.zeros(3, 5).double(), torch.zeros(5, 3).T):
        with pytest.raises(ValueError, match=r"squares must be float32 \[parts, 5\]"):
            launch_skinny_linear(x, weight, None, normed, eps=EPS, squares=squares)
    with pytest.raises(ValueError, match="is for gate and up"):
        launch_skinny_linear(x, weight, None, Tile("halves"))
    with pytest.raises(ValueError, match="residual must be contiguous"):
        launch_add_linear(torch.zeros(5, 64)[:, ::2], x, weight, None, DOT_TILES[0])
    with pytest.raises(ValueError, match="start at multiples of 16 bytes"):
        launch_skinny_linear(x[:, 1:], weight[:, 1:], None, TMA_TILES[0])
    with pytest.raises(ValueError, match="block_m of a tma tile"):
        Tile("tma", 64, 64, 4)
    with pytest.raises(ValueError, match="block_n of a dot tile"):
        Tile("dot", 8, 64, 4)
    with pytest.raises(ValueError, match="power of two"):
        Tile("gemv", 1, 48, 4)
    with pytest.raises(ValueError, match="split_k 1 for gemv"):
        Tile("gemv", 1, 64, 4, split_k=2)
    with pytest.raises(ValueError, match="kind"):
        Tile("gemm", 1, 64, 4)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ["whole", "halves"])
def test_by_library(device, assert_close, kind, bias):
    """cuBLAS for gate and up; without a bias the activation's kernel may norm, and float16 is normed first."""
    for leading in ((70,), (2, 3)):
        x, weight, some_bias = make_product(70, 48, 64, torch.float32, device, bias)
        x = 3 * (x[: 2 * 3].view(*leading, 64) if len(leading) > 1 else x)
        out = launch_skinny_linear(x, weight, some_bias, Tile(kind), gated=True)
        assert_close("out", out, expected_product(x, weight, some_bias, True))
        squares, tiles = squares_of(x.flatten(0, -2)), (Tile(kind, norms=True),) * len(M_BUCKETS)
        if not bias:
            out = launch_skinny_linear(x, weight, None, tiles[0], gated=True, eps=EPS, squares=squares)
            assert_close("norms", out, expected_product(x, weight, None, True, normed=True))
        for dtype in (torch.float32, torch.float16):
            projection = LinearWeight.from_tensors(weight.to(dtype), None if some_bias is None else some_bias.to(dtype))
            out = norm_linear(x.to(dtype), squares, EPS, dataclasses.replace(projection, tiles=tiles), gated=True)
            assert_close(f"normed {dtype}", out, expected_product(x, weight, some_bias, True, normed=True))
    with pytest.raises(ValueError, match="must have no bias"):
        launch_skinny_linear(x, weight, weight[:, 0], Tile(kind, norms=True), gated=True, eps=EPS, squares=squares)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_opcheck(device, gated):
    x, weight, bias = make_product(3, 32, 48, torch.float32, device)
    tile = NORM_TILES[0].to_ints()
    squares = squares_of(x)
    torch.library.opcheck(torch.ops.mini_infer.norm_linear.default, (x, squares, weight, bias, EPS, gated, tile))
    torch.library.opcheck(torch.ops.mini_infer.norm_linear.default, (x[None], None, weight, None, EPS, gated, tile))
    tile = DOT_TILES[2].to_ints()
    torch.library.opcheck(torch.ops.mini_infer.skinny_linear.default, (x, weight, bias, gated, tile))
    torch.library.opcheck(torch.ops.mini_infer.skinny_linear.default, (x[None], weight, None, gated, tile))
    residual = torch.randn(3, 32, device=device)
    torch.library.opcheck(torch.ops.mini_infer.add_linear.default, (residual, x, weight, bias, tile))
    torch.library.opcheck(torch.ops.mini_infer.add_linear.default, (residual[None], x[None], weight, None, tile))


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


def test_few_parts_or_none(kernel_device, assert_close):
    """Where a row's squares would come in many parts none are left."""
    x, weight, _ = make_product(3, 16 * MOST_PARTS + 1, 64, torch.float32, kernel_device, bias=False)
    for tile in (Tile("dot", 16, 64, 2, leaves=True), Tile("dot", 16, 32, 2, split_k=2, leaves=True)):
        residual = torch.zeros(3, len(weight), device=kernel_device)
        assert len(launch_add_linear(residual, x, weight, None, tile)) == (5 if tile.split_k > 1 else 0)
        assert_close("sum", residual, expected_product(x, weight, None))


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


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    "tile",
    [
        Tile("gemv", 2, 1024, 4, norms=True),
        Tile("dot", 32, 128, 2, 4, norms=True),
        Tile("tma", 128, 128, 4, 3, block_m=32, norms=True),
        Tile("dot", 32, 128, 2, 4),
        Tile("tma", 128, 128, 4, 3, block_m=16),
        Tile("tma", 128, 64, 8, 3, block_m=64, split_k=2),
        Tile("hopper", 64, 128, 4, 4, block_m=16),
        Tile("hopper", 64, 64, 4, 4, block_m=16, norms=True),
    ],
    ids=str,
)
def test_captured_in_a_cuda_graph(tile, gated):
    """Captured on some rows, replayed on others at the same address: what eager gives, to the bit."""
    torch.manual_seed(0)
    x, weight, bias = make_product(3, 512, 1024, torch.bfloat16, "cuda")
    squares = squares_of(x)

    def run():
        return launch_skinny_linear(x, weight, bias, tile, gated=gated, eps=EPS, squares=squares)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    squares.copy_(squares_of(x))
    for _ in range(3):
        graph.replay()
    assert torch.equal(captured, run())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "tiles"),
    [
        (1, [Tile("gemv", 2, 1024, 4, norms=True), Tile("gemv", 2, 1024, 4)]),
        (4, [Tile("gemv", 2, 1024, 4, norms=True), Tile("gemv", 2, 1024, 4)]),
        (16, [Tile("dot", 16, 256, 2, 4), Tile("dot", 32, 128, 4, 3, split_k=4)]),
        (16, [Tile("dot", 16, 256, 2, 4, norms=True), Tile("dot", 32, 128, 4, 3)]),
        (64, [Tile("dot", 16, 256, 2, 4), Tile("dot", 32, 128, 4, 3, split_k=4)]),
        (16, [Tile("tma", 64, 128, 4, 4, block_m=16), Tile("tma", 64, 128, 4, 3, block_m=16, split_k=4)]),
        (200, [Tile("tma", 64, 128, 4, 3, block_m=128), Tile("tma", 128, 64, 8, 3, block_m=256)]),
        (200, [Tile("tma", 64, 128, 4, 3, block_m=128, norms=True), Tile("tma", 128, 64, 8, 3, block_m=256)]),
        (64, [Tile("tma", 64, 128, 4, 4, block_m=64, norms=True), Tile("dot", 64, 128, 4, 3, split_k=4)]),
        (16, [Tile("hopper", 64, 128, 4, 8, block_m=16, norms=True), Tile("hopper", 64, 256, 4, 4, block_m=16)]),
        (16, [Tile("hopper", 64, 128, 4, 4, block_m=16), Tile("dot", 32, 128, 4, 3)]),
        (100, [Tile("hopper", 64, 64, 4, 8, block_m=128, norms=True), Tile("hopper", 64, 64, 4, 5, block_m=64)]),
    ],
    ids=str,
)
def test_a_chain_of_dependent_launches(m, tiles):
    """Kernels that start before their predecessor is done read what it wrote: a long chain, the same bits each time."""
    torch.manual_seed(0)
    n = 1024
    weights = (torch.randn(24, 2, n, n, device="cuda") / n**0.5).bfloat16()
    start = torch.randn(m, n, device="cuda").bfloat16()
    hidden = torch.empty_like(start)

    def layer(weight, squares, synchronise):
        if tiles[0].norms and (squares is not None or not tiles[0].needs_squares):
            product = launch_skinny_linear(hidden, weight[0], None, tiles[0], eps=EPS, squares=squares)
        else:
            normed = rmsnorm(hidden, None, EPS)
            synchronise()
            product = launch_skinny_linear(normed, weight[0], None, dataclasses.replace(tiles[0], norms=False))
        synchronise()
        squares = launch_add_linear(
            hidden, product, weight[1], None, dataclasses.replace(tiles[1], leaves=tiles[0].needs_squares)
        )
        synchronise()
        return squares

    def chain(synchronise):
        hidden.copy_(start)
        squares = None
        for weight in weights:
            squares = layer(weight, squares, synchronise)

    chain(torch.cuda.synchronize)
    expected = hidden.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(200):
        graph.replay()
        assert torch.equal(hidden, expected)
