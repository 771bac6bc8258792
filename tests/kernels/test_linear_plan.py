"""Which kernel a product gets: by measurement, and by a rule where nothing was measured."""

import pytest

from mini_infer.kernels.linear_plan import (
    M_BUCKETS,
    MAX_NORMED_ROWS,
    PLANS,
    LinearPlan,
    Tile,
    default_tile,
    pick,
)

GEMV = Tile("gemv", 2, 256, num_warps=4)


def test_pick_rounds_rows_up():
    tiles = tuple(Tile("dot", 16, 16 << i, 2) if i != 3 else None for i in range(len(M_BUCKETS)))
    chosen = {m: pick(tiles, m) for m in (1, 2, 3, 5, 8, 9, 64, 4097)}
    assert chosen == dict(zip(chosen, [*tiles[:3], None, None, tiles[4], tiles[6], None], strict=True))
    assert pick((), 1) is None


@pytest.mark.parametrize("hopper", [False, True], ids=["any GPU", "Hopper"])
def test_default_tiles_are_valid(hopper):
    """For every shape a tile that the kernels take; above 64 rows there is one for the gate alone."""
    for m in M_BUCKETS:
        for n in (2, 100, 1024, 151936):
            for k in (1, 64, 100, 4096, 14336, 53248):
                for role in ("plain", "norm", "norm_gate", "add"):
                    for element_size in (2, 4):
                        tile = default_tile(m, n, k, role, element_size, hopper=hopper)
                        if tile is None:
                            gates = role == "norm_gate" and k % 8 == n % 16 == 0 and element_size == 2
                            assert not (hopper and gates and m >= 2048)
                            continue
                        if m > 64:
                            assert role == "norm_gate" and m >= 2048 and tile.kind == "hopper"
                        assert m <= {"gemv": 4, "dot": 64}.get(tile.kind, m)
                        assert tile.block_n >= (2 if role == "norm_gate" else 1)
                        assert not tile.norms or role in ("norm", "norm_gate")
                        assert not tile.leaves or role == "add"
                        assert Tile.from_ints(tile.to_ints()) == tile
                        if tile.kind == "hopper":
                            assert hopper and k % 8 == 0 and n % 8 == 0 and element_size == 2
                            assert m <= tile.block_m or m > 64
                            stage = 2 * tile.block_k * (tile.block_m + tile.block_n)
                            columns = tile.block_n // 2 if role == "norm_gate" else tile.block_n
                            assert tile.num_stages * stage + 2 * columns * tile.block_m < 227 << 10, "shared memory"


def test_hopper_tiles_only_where_they_can_be_used():
    tile = Tile("hopper", 64, 128, 4, 8, block_m=16)
    plan = LinearPlan("Some GPU", "bfloat16", {(96, 64, "add"): {16: tile}})
    assert plan.choose(9, 96, 64, "add", hopper=True) == tile
    assert plan.choose(9, 96, 64, "add") == default_tile(16, 96, 64, "add", 2, hopper=False)
    assert {tile.kind for tile in plan.tiles(96, 64, "norm", hopper=True) if tile} == {"gemv", "hopper"}
    assert {tile.kind for tile in plan.tiles(96, 64, "norm", element_size=4, hopper=True) if tile} == {"gemv"}


def test_plan_on_disk(tmp_path):
    tile = Tile("dot", 64, 128, 4, 3, split_k=2)
    plan = LinearPlan("Some GPU", "bfloat16", {(96, 64, "add"): {1: None, 16: tile}, (96, 64, "norm"): {1: GEMV}})
    (tmp_path / "some.json").write_text(plan.to_json())
    (tmp_path / "other.json").write_text(LinearPlan("Other GPU").to_json())
    loaded = LinearPlan.for_gpu("Some GPU", tmp_path)
    assert loaded == plan
    assert LinearPlan.for_gpu("Unknown GPU", tmp_path) == LinearPlan()
    assert loaded.choose(1, 96, 64, "add") is None
    assert loaded.choose(9, 96, 64, "add") == tile
    assert loaded.choose(1, 96, 64, "norm") == GEMV
    assert loaded.choose(65, 96, 64, "add") is None
    assert loaded.choose(2, 96, 64, "add") == default_tile(2, 96, 64, "add", 2, hopper=False)
    assert loaded.choose(1, 96, 64, "add", element_size=4) == default_tile(1, 96, 64, "add", 4, hopper=False)
    for text in ("{}", "[", '{"gpu": "", "dtype": "", "shapes": [{"n": 1, "k": 1, "role": "?", "tiles": {}}]}'):
        with pytest.raises(ValueError, match="no plan of linear layers"):
            LinearPlan.from_json(text)


def test_shipped_plans_can_be_used():
    for path in PLANS.glob("*.json"):
        plan = LinearPlan.from_json(path.read_text())
        assert plan.gpu and plan.measured and LinearPlan.for_gpu(plan.gpu).gpu == plan.gpu
        for shape, tiles in plan.measured.items():
            role = shape[2]
            for m, tile in tiles.items():
                assert m in M_BUCKETS
                if tile is not None:
                    assert plan.choose(m, *shape, hopper=True) == tile
                    assert m <= {"gemv": 4, "dot": MAX_NORMED_ROWS if tile.norms else 64}.get(tile.kind, m)
                    assert not tile.norms or role in ("norm", "norm_gate")
                    assert not tile.is_library or role == "norm_gate"
