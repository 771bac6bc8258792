"""What is measured at the start: the arithmetic of it, without a GPU."""

from __future__ import annotations

import pytest

from mini_infer.builder import evenly, extrapolate_bytes, spread
from mini_infer.step import CaptureRecord, StepKind

DECODE, PREFILL = StepKind.DECODE, StepKind.PREFILL


def records(kind: StepKind, *sizes_in_bytes: int) -> list[CaptureRecord]:
    return [CaptureRecord(kind, 100 - index, 0.0, size) for index, size in enumerate(sizes_in_bytes)]


@pytest.mark.parametrize(
    ("trial", "num_graphs", "expected"),
    [
        (records(PREFILL, 900, 10, 20), {PREFILL: 3}, 1000),  # nothing is missing
        (records(PREFILL, 900, 10, 20), {PREFILL: 13}, 1150),  # 10 more at 15 each
        (records(PREFILL, 900, 0, 1), {PREFILL: 6}, 1002),  # rounded up
        (records(PREFILL, 900), {PREFILL: 1}, 1000),
        ([*records(PREFILL, 700, 10), *records(DECODE, 50, 2, 4)], {PREFILL: 4, DECODE: 5}, 1026),
    ],
)
def test_extrapolated_bytes(trial: list[CaptureRecord], num_graphs: dict[StepKind, int], expected: int) -> None:
    """The largest graph of a kind counts once, the others by their average."""
    assert extrapolate_bytes(trial, 1000, num_graphs) == expected


def test_evenly() -> None:
    """Smallest and largest are always there, nothing twice."""
    assert evenly((1, 2, 3), 6) == [1, 2, 3]
    assert evenly(tuple(range(1, 33)), 6) == [1, 7, 13, 20, 26, 32]
    for count in range(2, 9):
        for length in range(1, 40):
            chosen = evenly(tuple(range(length)), count)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == min(length, count)
            assert (chosen[0], chosen[-1]) == (0, length - 1)


def test_spread() -> None:
    """Every half as large again, and the last."""
    assert spread((1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17)) == [1, 2, 3, 5, 8, 12, 17]
    assert spread((5,)) == [5]
