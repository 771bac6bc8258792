"""What is measured at the start: the arithmetic of it, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mini_infer.builder import RunnerBuilder, StepMemory, evenly, extrapolate_bytes, spread
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


@pytest.mark.parametrize("interpreted", [False, True])
def test_kernels_are_compiled_before_memory_is_measured(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps' kernels, in between what counts as left behind for good, and before what a step takes is counted;
    the memory it took is given back. The interpreter has nothing to compile."""
    events: list[Any] = []

    class Trial:
        def compile(self, *sizes: object, max_chunks: int, progress: Any) -> None:
            events.append(("compile", *sizes, max_chunks))
            for done in (1, 2):
                progress(done, 2)

        def measure_prefill(self, sizes: object, max_chunks: int, limit_s: float) -> None:
            events.append(("prefill", sizes))

        def measure_decode(self, sizes: object, limit_s: float) -> None:
            events.append(("decode", sizes))

    def noted(event: str, value: object = None) -> Any:
        return lambda *args: (events.append(event), value)[1]

    parts = {
        "empty_cache": noted("empty cache"),
        "mem_get_info": noted("free", (1000, 2000)),
        "memory_allocated": noted("allocated", 100),
        "reset_peak_memory_stats": noted("reset peak"),
        "max_memory_allocated": noted("peak", 170),
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", noted("clear workspaces"), raising=False)
    monkeypatch.setattr("mini_infer.builder.INTERPRET", interpreted)
    monkeypatch.setattr(RunnerBuilder, "build", lambda self, num_gpu_blocks, num_cpu_blocks: Trial())
    shape: Any = SimpleNamespace(
        device=torch.device("cuda"),
        decode_sizes=(1, 2),
        prefill_sizes=(16, 32),
        captures=False,
        config=SimpleNamespace(progress=False, max_prefill_seqs=8),
    )
    assert RunnerBuilder(shape, params=None).measure_memory() == StepMemory(workspace=70)  # type: ignore[arg-type]
    compiling = [("compile", (1, 2), (16, 32), 8), "clear workspaces", "empty cache"]
    assert events == [
        *("empty cache", "free"),
        *([] if interpreted else compiling),
        *("allocated", "reset peak", ("prefill", (32,)), ("decode", (2,)), "peak"),
        *("empty cache", "free"),
    ]
