"""The matrix product: packed CPU weights, skinny GPU kernels, and the plan that chooses among them."""

import dataclasses

import pytest
import torch

from mini_infer.kernels import LinearWeight, pack_linear
from mini_infer.kernels.common import INTERPRET
from mini_infer.kernels.linear import can_pack, linear, linear_silu_mul, with_tiles
from mini_infer.kernels.linear_plan import M_BUCKETS, PLANS, LinearPlan, Tile, default_tile, pick
from mini_infer.kernels.skinny_linear import launch_skinny_linear

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


def make_product(m, n, k, dtype, device, bias=True):
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    return x, weight, torch.randn(n, device=device).to(dtype) if bias else None


def expected_product(x, weight, bias, gated):
    both = x.double() @ weight.double().T
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", GEMV_TILES + DOT_TILES, ids=str)
def test_tiles(kernel_device, assert_close, tile, gated, dtype):
    """Odd row counts, weight rows and columns that no tile divides, and ones that all divide."""
    cases = [(1, 38, 72, True), (3, 70, 100, False), (4, 64, 128, True)]
    if tile.kind == "dot":
        cases[2:] = [(17, 64, 128, True), (33, 38, 40, False)]
    for m, n, k, bias in cases:
        product = make_product(m, n, k, dtype, kernel_device, bias)
        out = launch_skinny_linear(*product, tile, gated=gated)
        assert out.dtype == dtype
        assert_close(f"{m}x{n}x{k}", out, expected_product(*product, gated))


@pytest.mark.parametrize("tile", [GEMV_TILES[1], DOT_TILES[0], DOT_TILES[2]], ids=str)
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
@pytest.mark.parametrize("tile", GEMV_TILES[:2] + DOT_TILES, ids=str)
def test_rows_do_not_see_each_other(kernel_device, tile, gated):
    """A row's result has the same bits again, in another place, and beside other rows."""
    x, weight, bias = make_product(4, 70, 100, torch.bfloat16, kernel_device)
    out = launch_skinny_linear(x, weight, bias, tile, gated=gated)
    assert torch.equal(out, launch_skinny_linear(x, weight, bias, tile, gated=gated))
    assert torch.equal(out.flip(0), launch_skinny_linear(x.flip(0), weight, bias, tile, gated=gated))
    other = torch.cat([x[:2], torch.randn_like(x[2:])])
    assert torch.equal(out[:2], launch_skinny_linear(other, weight, bias, tile, gated=gated)[:2])


def test_tiles_refuse_what_they_cannot_do():
    x, weight, _ = make_product(5, 32, 32, torch.float32, "cpu")
    with pytest.raises(ValueError, match="does not do 5 rows"):
        launch_skinny_linear(x, weight, None, GEMV_TILES[0], gated=False)
    with pytest.raises(ValueError, match="gated: True"):
        launch_skinny_linear(x[:1], weight[:31], None, GEMV_TILES[0], gated=True)
    with pytest.raises(ValueError, match="block_n of a dot tile"):
        Tile("dot", 8, 64, 4)
    with pytest.raises(ValueError, match="power of two"):
        Tile("gemv", 1, 48, 4)
    with pytest.raises(ValueError, match="split_k 1 for gemv"):
        Tile("gemv", 1, 64, 4, split_k=2)
    with pytest.raises(ValueError, match="kind"):
        Tile("gemm", 1, 64, 4)


@pytest.mark.parametrize("tile", [[], GEMV_TILES[0].to_ints(), DOT_TILES[2].to_ints()], ids=str)
@pytest.mark.parametrize("name", ["linear", "linear_silu_mul"])
def test_opcheck(device, name, tile):
    x, weight, bias = make_product(3, 32, 48, torch.float32, device)
    op = getattr(torch.ops.mini_infer, name).default
    torch.library.opcheck(op, (x, weight, bias, tile))
    torch.library.opcheck(op, (x[None], weight, None, tile))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_linear_silu_mul(assert_close, packed):
    x, weight, bias = make_product(3, 48, 64, torch.float32, "cpu")
    projection = LinearWeight.from_tensors(weight, bias)
    out = linear_silu_mul(x, pack_linear(projection) if packed else projection)
    assert_close("out", out, expected_product(x, weight, bias, True))


def test_attached_tiles_are_used(assert_close):
    """Below the last row count through our ops, above it through F.linear, with the same result."""
    x, weight, bias = make_product(70, 48, 64, torch.float32, "cpu")
    plan = LinearPlan()
    tiled = dataclasses.replace(
        LinearWeight.from_tensors(weight, bias),
        tiles=plan.tiles(48, 64, gated=False),
        gated_tiles=plan.tiles(48, 64, gated=True),
    )
    for m in (1, 9, 70):
        assert_close("plain", linear(x[:m], tiled), expected_product(x[:m], weight, bias, False))
        assert_close("gated", linear_silu_mul(x[:m], tiled), expected_product(x[:m], weight, bias, True))

    def names(function, rows):
        graph = torch.export.export(Wrapped(function, tiled), (rows,)).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    assert names(linear, x[:8]) == ["mini_infer.linear.default"]
    assert names(linear, x) == ["aten.linear.default"]
    assert names(linear_silu_mul, x[:1]) == ["mini_infer.linear_silu_mul.default"]
    assert names(linear_silu_mul, x) == ["aten.linear.default", "mini_infer.silu_and_mul.default"]
    with pytest.raises(ValueError, match=r"x must be \[..., 64\]"):
        linear_silu_mul(x[:, :60], tiled)


class Wrapped(torch.nn.Module):
    """A function of this module as something that torch.export takes."""

    def __init__(self, function, weight):
        super().__init__()
        self.function, self.weight = function, weight

    def forward(self, x):
        return self.function(x, self.weight)


def test_cpu_weights_get_no_tiles():
    weight = LinearWeight.from_tensors(torch.randn(8, 4))
    assert with_tiles(weight, LinearPlan()) is weight
    packed = pack_linear(weight)
    assert with_tiles(packed, LinearPlan()) is packed


def test_pick_rounds_rows_up():
    tiles = tuple(Tile("dot", 16, 16 << i, 2) if i != 3 else None for i in range(len(M_BUCKETS)))
    chosen = {m: pick(tiles, m) for m in (1, 2, 3, 5, 8, 9, 64, 65)}
    assert chosen == dict(zip(chosen, [*tiles[:3], None, None, tiles[4], tiles[6], None], strict=True))
    assert pick((), 1) is None


def test_default_tiles_are_valid():
    """For every shape a tile that the kernels take."""
    for m in M_BUCKETS:
        for n in (2, 100, 1024, 151936):
            for k in (1, 64, 100, 4096, 14336, 53248):
                for gated in (False, True):
                    for element_size in (2, 4):
                        tile = default_tile(m, n, k, gated, element_size)
                        assert tile is None or m <= (4 if tile.kind == "gemv" else 64)
                        assert tile is None or tile.block_n >= (2 if gated else 1)
                        assert tile is None or Tile.from_ints(tile.to_ints()) == tile


def test_plan_on_disk(tmp_path):
    tile = Tile("dot", 64, 128, 4, 3, split_k=2)
    plan = LinearPlan(
        "Some GPU", "bfloat16", {(96, 64, False): {1: None, 16: tile}, (96, 64, True): {1: GEMV_TILES[0]}}
    )
    (tmp_path / "some.json").write_text(plan.to_json())
    (tmp_path / "other.json").write_text(LinearPlan("Other GPU").to_json())
    loaded = LinearPlan.for_gpu("Some GPU", tmp_path)
    assert loaded == plan
    assert LinearPlan.for_gpu("Unknown GPU", tmp_path) == LinearPlan()
    assert loaded.choose(1, 96, 64, gated=False) is None
    assert loaded.choose(9, 96, 64, gated=False) == tile
    assert loaded.choose(1, 96, 64, gated=True) == GEMV_TILES[0]
    assert loaded.choose(65, 96, 64, gated=False) is None
    assert loaded.choose(2, 96, 64, gated=False) == default_tile(2, 96, 64, False, 2)
    assert loaded.choose(1, 96, 64, gated=False, element_size=4) == default_tile(1, 96, 64, False, 4)
    for text in ("{}", "[", '{"gpu": "", "dtype": "", "shapes": [{"n": 1}]}'):
        with pytest.raises(ValueError, match="no plan of linear layers"):
            LinearPlan.from_json(text)


def test_shipped_plans_can_be_read():
    for path in PLANS.glob("*.json"):
        plan = LinearPlan.from_json(path.read_text())
        assert plan.gpu and plan.measured and LinearPlan.for_gpu(plan.gpu).gpu == plan.gpu


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16, 31, 64])
def test_plan_on_the_gpu(assert_close, m, gated):
    """The choices for real shapes, for the rule and for the shipped plan of this GPU."""
    torch.manual_seed(0)
    for n, k in ((6144, 1024), (1024, 3072), (4096, 14336)):
        x, weight, _ = make_product(m, n, k, torch.bfloat16, "cuda", bias=False)
        for plan in (LinearPlan(), LinearPlan.for_gpu(torch.cuda.get_device_name())):
            tiled = with_tiles(LinearWeight.from_tensors(weight), plan)
            assert len(tiled.tiles) == len(M_BUCKETS)
            out = linear_silu_mul(x, tiled) if gated else linear(x, tiled)
            assert_close(f"{n}x{k}", out, expected_product(x, weight, None, gated))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", [Tile("gemv", 2, 1024, 4), Tile("dot", 32, 128, 2, 4), DOT_TILES[2]], ids=str)
def test_captured_in_a_cuda_graph(tile, gated):
    """Captured on some rows, replayed on others at the same address: what eager gives, to the bit."""
    torch.manual_seed(0)
    x, weight, bias = make_product(3, 512, 1024, torch.bfloat16, "cuda")
    op = getattr(torch.ops.mini_infer, "linear_silu_mul" if gated else "linear").default
    op(x, weight, bias, tile.to_ints())  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(x, weight, bias, tile.to_ints())
    x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    assert torch.equal(captured, op(x, weight, bias, tile.to_ints()))
