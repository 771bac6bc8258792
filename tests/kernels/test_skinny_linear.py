"""The kernels of matrix products with few rows, but for the Hopper tiles: each kind of tile against the formula."""

import dataclasses

import pytest
import torch

from mini_infer.kernels import LinearWeight, rmsnorm
from mini_infer.kernels.common import INTERPRET
from mini_infer.kernels.linear import norm_linear
from mini_infer.kernels.linear_plan import (
    M_BUCKETS,
    MAX_NORMED_ROWS,
    MOST_PARTS,
    REDUCED_COLUMNS,
    Tile,
    square_parts,
)
from mini_infer.kernels.skinny_linear import launch_add_linear, launch_skinny_linear
from tests.kernels.products import EPS, expected_product, make_product, squares_of

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
NORM_TILES = [dataclasses.replace(tile, norms=True) for tile in GEMV_TILES + DOT_TILES + TMA_TILES if tile.split_k == 1]


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


def test_few_parts_or_none(kernel_device, assert_close):
    """Where a row's squares would come in many parts none are left."""
    x, weight, _ = make_product(3, 16 * MOST_PARTS + 1, 64, torch.float32, kernel_device, bias=False)
    for tile in (Tile("dot", 16, 64, 2, leaves=True), Tile("dot", 16, 32, 2, split_k=2, leaves=True)):
        residual = torch.zeros(3, len(weight), device=kernel_device)
        assert len(launch_add_linear(residual, x, weight, None, tile)) == (5 if tile.split_k > 1 else 0)
        assert_close("sum", residual, expected_product(x, weight, None))


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
        Tile("hopper", 128, 64, 8, 3, block_m=256),
        Tile("hopper", 128, 64, 8, 4, block_m=128, split_k=2),
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
        (100, [Tile("hopper", 64, 128, 4, 4, block_m=128), Tile("hopper", 128, 64, 8, 6, block_m=128, split_k=4)]),
        (200, [Tile("hopper", 128, 64, 8, 3, block_m=256, norms=True), Tile("hopper", 128, 64, 8, 3, block_m=256)]),
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
