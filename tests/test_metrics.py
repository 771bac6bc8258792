"""What the engine tells of itself: phases of its start that leave no gap, and what the times of its steps come to."""

from __future__ import annotations

import dataclasses
import time

import pytest

from mini_infer.metrics import PhaseClock, StartupReport, StepTime, idle_share, median_step_ms
from mini_infer.step import StepKind


@pytest.fixture
def clock_hand(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`time.perf_counter` shows the last entry."""
    hand = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: hand[-1])
    return hand


def test_phases_by_name(clock_hand: list[float]) -> None:
    """A phase is the time since the mark before it, in the order of first marks; a name marked twice adds up."""
    clock = PhaseClock()
    for name, now in (("config", 101.0), ("weights", 105.5), ("config", 106.0), ("empty", 106.0)):
        clock_hand.append(now)
        clock.mark(name)
    report = clock.report()
    assert list(report.phases.items()) == [("config", 1.5), ("weights", 4.5), ("empty", 0.0)]
    assert report.total == 6.0


def test_the_time_after_the_last_mark_is_nobodys(clock_hand: list[float]) -> None:
    """Reporting late changes neither total nor phases, so that they go on adding up."""
    clock = PhaseClock()
    clock_hand.append(102.0)
    clock.mark("only")
    clock_hand.append(200.0)
    assert clock.report() == StartupReport({"only": 2.0}, 2.0)


def test_phases_add_up_to_the_total() -> None:
    """With the real clock, to the rounding of the sum."""
    begun = time.perf_counter()
    clock = PhaseClock()
    for index in range(50):
        sum(range(100 * index))
        clock.mark(f"phase {index % 7}")
    report = clock.report()
    assert sum(report.phases.values()) == pytest.approx(report.total, abs=1e-9)
    assert 0 < report.total <= time.perf_counter() - begun
    assert min(report.phases.values()) > 0


def test_a_report_is_a_snapshot() -> None:
    """Marks after a report do not change it."""
    clock = PhaseClock()
    clock.mark("a")
    report = clock.report()
    before = dict(report.phases), report.total
    clock.mark("b")
    assert (report.phases, report.total) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.total = 1.0  # type: ignore[misc]


def test_describe_names_every_phase() -> None:
    """One line with the total and each phase, in seconds."""
    line = StartupReport({"config": 0.25, "weights": 1.5}, 1.75).describe()
    assert line == "started in 1.75 s: config 0.25, weights 1.50"


def step_of(kind: StepKind, bucket: int, ms: float, gap_ms: float | None, *request_ids: str) -> StepTime:
    return StepTime(1, kind, bucket, request_ids, ms, gap_ms, 0.0)


def test_median_step_by_bucket() -> None:
    steps = [
        *(step_of(StepKind.DECODE, 8, ms, 0.0, "a") for ms in (3.0, 1.0, 10.0)),
        step_of(StepKind.PREFILL, 8, 99.0, 0.0, "a"),
        *(step_of(StepKind.DECODE, 2, ms, 0.0, "a") for ms in (1.0, 2.0)),
    ]
    assert list(median_step_ms(steps, StepKind.DECODE).items()) == [(2, 1.5), (8, 3.0)]
    assert median_step_ms(steps, StepKind.PREFILL) == {8: 99.0}
    assert median_step_ms([], StepKind.DECODE) == {}


def test_idle_is_of_the_steady_state_only() -> None:
    """Decode steps with the rows of the step before them; not the one after a prefill step, nor after a change."""
    decode, prefill = StepKind.DECODE, StepKind.PREFILL
    steps = [
        step_of(prefill, 16, 5.0, None, "a"),
        step_of(decode, 1, 9.0, 50.0, "a"),
        step_of(decode, 1, 9.0, 1.0, "a"),
        step_of(decode, 1, 6.0, 0.5, "a"),
        step_of(decode, 2, 9.0, 50.0, "a", "b"),
        step_of(decode, 2, 3.0, 0.5, "a", "b"),
    ]
    assert idle_share(steps) == pytest.approx(2.0 / 20.0)
    assert idle_share(steps[:2]) is None and idle_share([]) is None
