"""Plans on disk: what was saved for a key comes back for that key alone, and a broken file is no plan."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.exceptions import ConfigError
from mini_infer.machine_plan import MachinePlan, PlanStore, worthwhile
from tests.hypothesis_profiles import PROPERTY

KEY = {"spec": "llama", "torch": "2.11", "max_num_seqs": "8"}
PLAN = MachinePlan(1000, 2000, (1, 4, 8), (16, 512), {1: 0.5, 8: 0.75}, {16: 1.0, 512: 9.5}, 0.125, 2e-5, 300)


def test_round_trip(tmp_path: Path) -> None:
    """A saved plan is loaded as it was, bucket numbers as numbers."""
    store = PlanStore(tmp_path / "plans")
    assert store.load(KEY) is None
    path = store.save(KEY, PLAN)
    assert path == store.path(KEY)
    assert store.load(KEY) == PLAN


@pytest.mark.parametrize("name", sorted(KEY))
def test_any_other_key_has_none(tmp_path: Path, name: str) -> None:
    """Whatever the measurements depend on: if it changed, they do not count."""
    store = PlanStore(tmp_path)
    store.save(KEY, PLAN)
    assert store.load({**KEY, name: "other"}) is None
    assert store.load({**KEY, "more": "x"}) is None


def test_without_swap_space(tmp_path: Path) -> None:
    """No swap cost stays no swap cost."""
    store = PlanStore(tmp_path)
    plan = MachinePlan(0, 0, (1,), (1,), {1: 1.0}, {1: 1.0}, None, 0.0, 1)
    store.save(KEY, plan)
    assert store.load(KEY) == plan


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": 1, "plan": 2}'])
def test_broken_file(tmp_path: Path, text: str) -> None:
    """A file that cannot be read counts as none, and is replaced by the next save."""
    store = PlanStore(tmp_path)
    store.path(KEY).write_text(text)
    assert store.load(KEY) is None
    store.save(KEY, PLAN)
    assert store.load(KEY) == PLAN


@pytest.mark.parametrize("costs", [{}, {"1": 0.0}, {"1": -1.0}, {"a": 1.0}, [1.0]])
def test_costs_that_cannot_be(tmp_path: Path, costs: object) -> None:
    """Costs that no step can have make the plan unusable, not the scheduler."""
    store = PlanStore(tmp_path)
    store.save(KEY, PLAN)
    value = json.loads(store.path(KEY).read_text())
    value["plan"]["decode_ms"] = costs
    store.path(KEY).write_text(json.dumps(value))
    assert store.load(KEY) is None


@pytest.mark.parametrize(
    ("name", "added"),
    [
        *itertools.product(["context_ms_per_token", "swap_ms_per_block"], [-1e-9, math.nan, math.inf, "a", [1.0]]),
        ("context_ms_per_token", None),
    ],
)
def test_added_costs_that_cannot_be(tmp_path: Path, name: str, added: object) -> None:
    """As for costs, but nothing is a cost that context and swapping can have."""
    store = PlanStore(tmp_path)
    store.save(KEY, PLAN)
    value = json.loads(store.path(KEY).read_text())
    value["plan"][name] = added
    store.path(KEY).write_text(json.dumps(value))
    assert store.load(KEY) is None


def test_a_plan_from_before_context_was_measured(tmp_path: Path) -> None:
    """It counts as none, and its other figures are measured again with it."""
    store = PlanStore(tmp_path)
    store.save(KEY, PLAN)
    value = json.loads(store.path(KEY).read_text())
    del value["plan"]["context_ms_per_token"]
    store.path(KEY).write_text(json.dumps(value))
    assert store.load(KEY) is None


@pytest.mark.parametrize("sizes", [[], [0, 8], ["a"], 8])
def test_sizes_that_cannot_be(tmp_path: Path, sizes: object) -> None:
    """As for costs."""
    store = PlanStore(tmp_path)
    store.save(KEY, PLAN)
    value = json.loads(store.path(KEY).read_text())
    value["plan"]["decode_sizes"] = sizes
    store.path(KEY).write_text(json.dumps(value))
    assert store.load(KEY) is None


def test_nothing_but_plans_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving leaves nothing else behind, also when it fails; others who share the folder may read them."""
    store = PlanStore(tmp_path)
    store.save(KEY, PLAN)
    store.save(KEY, PLAN)
    assert [path.name for path in tmp_path.iterdir()] == [store.path(KEY).name]
    (tmp_path / "any").touch()
    assert store.path(KEY).stat().st_mode == (tmp_path / "any").stat().st_mode

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ConfigError, match="No space left"):
        store.save({**KEY, "another": "key"}, PLAN)
    assert {path.name for path in tmp_path.iterdir()} == {store.path(KEY).name, "any"}


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """The error says what to set."""
    (tmp_path / "plans").write_text("a file")
    with pytest.raises(ConfigError, match="MINI_INFER_HOME"):
        PlanStore(tmp_path / "plans").save(KEY, PLAN)


# Which buckets earn their place


@pytest.mark.parametrize(
    ("costs", "kept"),
    [
        ({8: 1.0}, (8,)),
        ({1: 1.0, 2: 2.0, 4: 4.0}, (1, 2, 4)),  # proportional: all of them
        ({1: 5.0, 2: 5.0, 4: 5.0, 8: 5.0}, (8,)),  # a plateau: its end
        ({1: 1.0, 2: 1.01, 4: 1.02, 8: 2.0, 16: 2.01}, (4, 16)),  # two plateaus
        ({1: 0.96, 2: 0.98, 4: 1.0}, (1, 4)),  # small savings add up
        ({1: 0.97, 2: 1.0}, (1, 2)),  # just enough
        ({1: 0.971, 2: 1.0}, (2,)),
        ({1: 3.0, 2: 1.0, 4: 2.0}, (2, 4)),  # dearer than a larger one
        ({1: 1.0, 2: 3.0, 4: 2.0}, (1, 4)),
    ],
)
def test_worthwhile(costs: dict[int, float], kept: tuple[int, ...]) -> None:
    """A bucket stays if it saves at least 3 % against the next larger one that stays."""
    assert worthwhile(costs, min_saving=0.03) == kept


@PROPERTY
@given(st.dictionaries(st.integers(1, 300), st.floats(0.1, 10.0), min_size=1), st.floats(0.0, 0.2))
def test_no_batch_pays_more_than_the_margin(costs: dict[int, float], min_saving: float) -> None:
    """The largest stays; without the others, no size's cheapest bucket costs more than the margin over what it did."""
    kept = worthwhile(costs, min_saving)
    assert list(kept) == sorted(set(kept) & set(costs))
    assert kept[-1] == max(costs)
    for size in costs:
        before = min(cost for bucket, cost in costs.items() if bucket >= size)
        after = min(costs[bucket] for bucket in kept if bucket >= size)
        assert after * (1 - min_saving) <= before * (1 + 1e-9)
