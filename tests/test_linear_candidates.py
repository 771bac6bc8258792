"""What the tuner of the matrix products measures, and how it chooses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mini_infer.kernels.linear_plan import (
    DECODE_BUCKETS,
    M_BUCKETS,
    MAX_DOT_ROWS,
    MAX_GEMV_ROWS,
    MAX_NORMED_ROWS,
    PLANS,
    LinearPlan,
    Tile,
)
from scripts import linear_candidates as tuning


def problem(model: str, name: str, m: int) -> Any:
    n, k, role = tuning.SHAPES[model][name]
    return tuning.Problem(f"{model} {name}", n, k, role, m)


@pytest.mark.parametrize("m", M_BUCKETS)
@pytest.mark.parametrize("model", tuning.SHAPES)
def test_candidates_can_do_their_product(model: str, m: int) -> None:
    """Each is within what its kernel takes, none is there twice, and in decode products that norm have tiles that do.

    With more rows only the gate is measured.
    """
    problems = [problem(model, name, m) for name in tuning.SHAPES[model]]
    measured = [each for each in problems if tuning.is_worthwhile(each)]
    assert measured == (problems if m in DECODE_BUCKETS else [problem(model, "gate_up", m)])
    for each in measured:
        tiles = tuning.candidates(each, quick=False)
        assert len(set(tiles)) == len(tiles) > 2
        assert set(tuning.candidates(each, quick=True)) <= set(tiles)
        assert any(tile.norms for tile in tiles) == (each.normed and m in DECODE_BUCKETS)
        for tile in tiles:
            assert m <= {"gemv": MAX_GEMV_ROWS, "dot": MAX_DOT_ROWS}.get(tile.kind, m)
            assert not (tile.norms and tile.kind == "dot") or m <= MAX_NORMED_ROWS
            assert not tile.is_library or each.gated
            assert tile.leaves == (each.role == "add" and tile.kind in ("dot", "tma", "hopper"))
            assert tile.is_library or tile.block_n >= (2 if each.gated else 1)
            assert tile.split_k == 1 or not tile.norms
            if tile.kind == "hopper":
                stages = 2 * tile.num_stages * tile.block_k * (tile.block_m + tile.block_n)
                result = 2 * tile.block_m * tile.block_n // (2 if each.gated else 1) if tile.split_k == 1 else 0
                rest = (6 if m in DECODE_BUCKETS else 1) << 10  # most of it for the norm
                assert stages + result + rest < 227 << 10, f"{tile}: shared memory"


ADDS, NORMS = Tile("tma", 64, 128, 4, block_m=64, leaves=True), Tile("tma", 128, 128, 4, block_m=64, norms=True)
UNREAD = replace(ADDS, leaves=False)
ALONE = Tile("dot", 32, 256, 2, norms=True)


@pytest.mark.parametrize(
    ("added", "normed", "expected"),
    [
        ([(10.0, None), (10.5, ADDS)], [(20.0, None), (18.0, NORMS)], (ADDS, NORMS)),  # the squares are worth 0.5 us
        ([(10.0, None), (15.0, ADDS)], [(20.0, None), (18.5, NORMS)], (None, None)),  # not 5
        ([(10.0, None), (15.0, ADDS)], [(20.0, None), (15.0, NORMS)], (None, NORMS)),  # even with a kernel that norms
        ([(10.0, None), (15.0, ADDS)], [(20.0, None), (18.5, ALONE)], (None, ALONE)),  # it needs none
        ([(10.0, None), (9.9, ADDS)], [(20.0, None), (19.9, ALONE)], (None, None)),  # what is hardly faster
        ([(10.0, None), (9.0, ADDS)], [(20.0, None), (18.5, ALONE)], (UNREAD, ALONE)),  # squares that nobody reads
    ],
)
def test_pairs_are_chosen_together(added: Any, normed: Any, expected: Any) -> None:
    o, gate_up, qkv = (problem("8b", name, 64) for name in ("o", "gate_up", "qkv"))
    chosen = tuning.choose({o: added, gate_up: normed, qkv: [(5.0, None), (4.0, ALONE)]})
    assert (chosen[o], chosen[gate_up]) == expected
    assert chosen[qkv] == ALONE, "its partner was not measured"
    assert tuning.choose({qkv: [(5.0, None), (4.0, NORMS)]})[qkv] is None, "and may leave no squares"
    other_rows = problem("8b", "o", 128)
    alone = tuning.choose({other_rows: added})[other_rows]
    assert tuning.choose({other_rows: added, gate_up: normed})[other_rows] == alone, "not of the same row count"


def test_variations_of_a_product_that_norms() -> None:
    """Its fastest kernels and cuBLAS, each once; the product before it leaves squares for those that need them."""
    timings: dict[str, Any] = {
        "gate_up": [(20.0, None), (18.0, NORMS), (19.0, ALONE)],
        "o": [(10.0, None), (11.0, ADDS)],
    }
    chosen: tuning.Choice = {"gate_up": None, "o": None, "head": ALONE}
    assert tuning.variations(chosen, timings, "gate_up") == [
        {**chosen, "gate_up": NORMS, "o": ADDS},  # cuBLAS leaves none, so the fastest that does
        {**chosen, "gate_up": ALONE},
    ]
    chosen = {"gate_up": NORMS, "o": ADDS}
    assert tuning.variations(chosen, timings, "gate_up") == [
        {"gate_up": ALONE, "o": UNREAD},
        {"gate_up": None, "o": UNREAD},
    ]


def test_variations_of_a_product_that_adds() -> None:
    """It leaves squares if they are read."""
    timings: dict[str, Any] = {"o": [(10.0, None), (9.0, ADDS)], "head": [(5.0, None)]}
    assert tuning.variations({"gate_up": NORMS, "o": None}, timings, "o") == [{"gate_up": NORMS, "o": ADDS}]
    assert tuning.variations({"gate_up": ALONE, "o": None}, timings, "o") == [{"gate_up": ALONE, "o": UNREAD}]
    assert tuning.variations({"gate_up": None, "o": UNREAD}, timings, "o") == [{"gate_up": None, "o": None}]
    assert tuning.variations({"head": None}, timings, "head") == []


def test_only_the_fastest_are_tried() -> None:
    tiles = [Tile("dot", 16 << index, 256, 2) for index in range(7)]
    timings: dict[str, Any] = {"head": [(9.0, None), *((10.0 + index, tile) for index, tile in enumerate(tiles))]}
    varied = tuning.variations({"head": tiles[6]}, timings, "head")
    assert [choice["head"] for choice in varied] == [None, *tiles[: tuning.CONTENDERS - 1]]


def test_a_search_takes_what_makes_the_step_faster() -> None:
    """Product by product, from what was taken before; not what is faster by less than the clock's noise."""
    of_o, of_head = [(10.0, None), (9.0, ADDS)], [(5.0, None), (4.0, ALONE)]
    timings: dict[str, Any] = {
        "gate_up": [(20.0, None), (18.0, NORMS)],
        "o": of_o,
        "qkv": [],
        "down": [],
        "head": of_head,
    }
    start: tuning.Choice = dict.fromkeys(timings)
    steps: list[tuning.Choice] = []

    def measure(choices: Sequence[tuning.Choice]) -> list[float]:
        steps.extend(choices)
        return [100.0 - 2.0 * (c["gate_up"] == NORMS) - 0.1 * (c["head"] == ALONE) for c in choices]

    best, taken = tuning.search(measure, start, timings)
    assert best == {**start, "gate_up": NORMS, "o": ADDS}
    assert taken == [(100.0, 98.0, best)]
    assert {**best, "head": ALONE} in steps, "tried with what was taken before"


def test_a_plan_is_not_overwritten_by_another_gpus(tmp_path: Path) -> None:
    """The shipped plans are found by the GPU's name; what one says is kept, and another GPU's is left alone."""
    for path in PLANS.glob("*.json"):
        plan = LinearPlan.from_json(path.read_text(encoding="utf-8"))
        assert path.name == tuning.plan_name(plan.gpu)
        assert tuning.earlier_choices(path, plan.gpu) == plan.measured
        with pytest.raises(SystemExit, match="name another file with --out"):
            tuning.earlier_choices(path, "NVIDIA A100")
    assert tuning.plan_name("NVIDIA H200") == "h200-bf16.json"
    assert tuning.earlier_choices(tmp_path / "none.json", "NVIDIA H200") == {}
