"""The matrix products for Hopper GPUs: against the formula, and what they refuse."""

import dataclasses
import itertools

import pytest
import torch

from mini_infer.kernels import linear_hopper
from mini_infer.kernels.linear_hopper import launch_hopper
from mini_infer.kernels.linear_plan import REDUCED_COLUMNS, Tile, square_parts
from mini_infer.kernels.skinny_linear import launch_add_linear, launch_skinny_linear
from tests.kernels.products import EPS, expected_product, squares_of

TILES = [
    Tile("hopper", 64, 64, 4, 2, block_m=16),
    Tile("hopper", 64, 64, 4, 8, block_m=32),
    Tile("hopper", 64, 256, 4, 4, block_m=16),
    Tile("hopper", 64, 128, 4, 6, block_m=64),
    Tile("hopper", 64, 64, 4, 8, block_m=128),
    Tile("hopper", 128, 64, 8, 6, block_m=64),
    Tile("hopper", 128, 64, 8, 3, block_m=256),
]
GATED_TILES = [
    *TILES,
    Tile("hopper", 128, 64, 4, 4, block_m=32),
    Tile("hopper", 128, 64, 4, 6, block_m=128),
    Tile("hopper", 256, 64, 8, 3, block_m=128),
]
SPLIT_TILES = [  # of the shapes some have fewer columns than would give each program any
    Tile("hopper", 64, 64, 4, 3, 3, block_m=16),
    Tile("hopper", 64, 128, 4, 6, 2, block_m=64),
    Tile("hopper", 128, 64, 8, 6, 4, block_m=128),
    Tile("hopper", 128, 64, 8, 4, 4, block_m=256),
]
SHAPES = [(1, 48, 72), (19, 304, 104), (66, 128, 128), (150, 64, 1000)]  # m, n, k


def on_the_gpu():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(0)


def operands(m, n, k, dtype):
    x = torch.randn(m, k, device="cuda").to(dtype)
    x *= torch.logspace(-1, 1, m, device="cuda").to(dtype)[:, None]
    return x, (torch.randn(n, k, device="cuda") / k**0.5).to(dtype), torch.randn(n, device="cuda").to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tile", "gated", "normed"),
    [
        *itertools.product(TILES, [False], [False, True]),
        *itertools.product(GATED_TILES, [True], [False, True]),
        *itertools.product(SPLIT_TILES, [False, True], [False]),
    ],
    ids=str,
)
def test_products(assert_close, tile, gated, normed, dtype):
    """With and without a bias, at sizes that no tile divides; nothing is written past the end."""
    on_the_gpu()
    tile = dataclasses.replace(tile, norms=normed)
    for m, n, k in SHAPES:
        x, weight, bias = operands(m, n, k, dtype)
        for some_bias in (None, bias):
            width = n // 2 if gated else n
            around = torch.full((m + 2, width), float("nan"), device="cuda", dtype=dtype)
            out = around[1:-1]
            launch_hopper(x, weight, some_bias, tile, gated, EPS, squares_of(x, 3) if normed else None, out, None)
            assert_close(f"{m}x{n}x{k}", out, expected_product(x, weight, some_bias, gated=gated, normed=normed))
            assert around[0].isnan().all() and around[-1].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [*TILES, *SPLIT_TILES], ids=str)
def test_adds_to_a_residual(assert_close, tile, dtype):
    """And leaves the squares of what it holds then."""
    on_the_gpu()
    columns = tile.block_n if tile.split_k == 1 else REDUCED_COLUMNS
    for m, n, k in SHAPES:
        x, weight, bias = operands(m, n, k, dtype)
        residual = torch.randn(m, n, device="cuda").to(dtype)
        for some_bias in (None, bias):
            summed = residual.clone()
            squares = launch_add_linear(summed, x, weight, some_bias, dataclasses.replace(tile, leaves=True))
            assert_close(f"{m}x{n}x{k}", summed, residual.double() + expected_product(x, weight, some_bias))
            padded = torch.nn.functional.pad(summed.double().square(), (0, -n % columns)).view(m, -1, columns)
            assert len(squares) == square_parts(dataclasses.replace(tile, leaves=True), n)
            assert_close("squares", squares, padded.sum(-1).T, 1e-5)
            again = residual.clone()
            assert len(launch_add_linear(again, x, weight, some_bias, tile)) == 0
            assert torch.equal(again, summed)


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("tile", GATED_TILES, ids=str)
def test_many_programs(assert_close, tile, normed):
    """More than fit on the GPU at once: the same bits every time, also when the one before has just left."""
    on_the_gpu()
    tile = dataclasses.replace(tile, norms=normed)
    x, weight, _ = operands(tile.block_m, 49152, 512, torch.bfloat16)
    squares = squares_of(x, 3) if normed else None
    outs = [torch.full((len(x), 24576), float("nan"), device="cuda", dtype=x.dtype) for _ in range(20)]
    for out in outs:
        launch_hopper(x, weight, None, tile, True, EPS, squares, out, None)
    assert_close("first", outs[0], expected_product(x, weight, gated=True, normed=normed))
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tile",
    [
        *[
            dataclasses.replace(tile, norms=norms)
            for tile in GATED_TILES
            if tile.num_warps == 8
            for norms in (False, True)
        ],
        Tile("hopper", 256, 64, 8, 4, block_m=128),  # with as much shared memory as there is
    ],
    ids=str,
)
def test_programs_that_stay(monkeypatch, assert_close, tile, dtype):
    """Eight programs for some 150 tiles: the bits are those of a program for each, whatever the steps of a tile leave
    of the stages, and nothing is written past the end."""
    on_the_gpu()
    for k, biased in itertools.product((72, 200, 1000), (False, True)):
        m, n = 18 * tile.block_m + 5, 8 * tile.block_n - 16
        x, weight, bias = operands(m, n, k, dtype)
        bias = bias if biased else None
        squares = squares_of(x, 3) if tile.norms else None
        results = []
        for many in (4, 4, 4, 1 << 30):
            monkeypatch.setattr(linear_hopper, "multiprocessors", lambda device: 8)
            monkeypatch.setattr(linear_hopper, "_MANY", many)
            around = torch.full((m + 2, n // 2), float("nan"), device="cuda", dtype=dtype)
            launch_hopper(x, weight, bias, tile, True, EPS, squares, around[1:-1], None)
            assert around[0].isnan().all() and around[-1].isnan().all()
            results.append(around[1:-1])
        assert all(torch.equal(result, results[-1]) for result in results)
        assert_close(f"{m}x{n}x{k}", results[0], expected_product(x, weight, bias, gated=True, normed=tile.norms))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", [*TILES, *SPLIT_TILES], ids=str)
def test_rows_do_not_see_each_other(tile, gated):
    """A row's result has the same bits in another place, beside other rows, and beside infinities."""
    on_the_gpu()
    x, weight, bias = operands(40, 304, 200, torch.bfloat16)
    out = launch_skinny_linear(x, weight, bias, tile, gated=gated)
    assert torch.equal(out.flip(0), launch_skinny_linear(x.flip(0), weight, bias, tile, gated=gated))
    others = torch.cat([x[:7], torch.full_like(x[7:], float("inf"))])
    assert torch.equal(out[:7], launch_skinny_linear(others, weight, bias, tile, gated=gated)[:7])


@pytest.mark.gpu
def test_takes_views(assert_close):
    """Strided rows of x, a weight that is a part of another."""
    on_the_gpu()
    x, weight, _ = operands(9, 400, 512, torch.bfloat16)
    x, weight = x[:, 64:320], weight[16:80, 8:264]
    for gated in (False, True):
        out = launch_skinny_linear(x, weight, None, TILES[1], gated=gated)
        assert_close(f"gated {gated}", out, expected_product(x, weight, gated=gated))


def test_refuses_what_it_cannot_do(monkeypatch):
    x, weight = torch.zeros(3, 64).half(), torch.zeros(64, 64).half()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a GPU of compute capability 9\.0"):
            launch_skinny_linear(x, weight, None, TILES[0])
    monkeypatch.setattr(linear_hopper, "on_hopper", lambda: True)
    with pytest.raises(ValueError, match=r"wants 16-bit types.*got torch\.float32"):
        launch_skinny_linear(x.float(), weight.float(), None, TILES[0])
    with pytest.raises(ValueError, match=r"columns of the result in eights, got torch\.float16 and 60"):
        launch_skinny_linear(x, weight[:60], None, TILES[0])
    with pytest.raises(ValueError, match="needs x with contiguous rows"):
        launch_skinny_linear(torch.zeros(3, 68).half()[:, 4:], weight, None, TILES[0])
    for wrong in ({"block_m": 512}, {"num_warps": 8}, {"num_warps": 2}, {"block_m": 256, "block_n": 128}):
        with pytest.raises(ValueError, match=r"a hopper tile has 4 warps or 8, .* got .*hopper"):
            Tile(**{"kind": "hopper", "block_n": 64, "block_k": 64, "num_warps": 4, "block_m": 16, **wrong})
    with pytest.raises(ValueError, match="block_k of a hopper tile"):
        Tile("hopper", 64, 32, 4, block_m=16)
