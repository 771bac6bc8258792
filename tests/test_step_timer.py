"""The times of steps: spans on the device's clock, and the log of them."""

from __future__ import annotations

import time

import pytest
import torch

from mini_infer.sampling import SamplingParams
from mini_infer.step import PrefillChunk, SchedulerOutputs, StepKind
from mini_infer.step_timer import StepLog, StepSpan

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`time.perf_counter` shows the last entry."""
    hand = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: hand[-1])
    return hand


def chunk(request_id: str, *, is_last: bool) -> PrefillChunk:
    return PrefillChunk(request_id, 0, (3, 4), (1,), SamplingParams(), 0, is_last=is_last)


def test_log_by_hand(clock: list[float]) -> None:
    """A second and a half, half a second of gap, a quarter of a second; read back later than they ended."""
    log = StepLog()
    spans = []
    for begun, ended in ((100.0, 101.5), (102.0, 102.25)):
        clock.append(begun)
        spans.append(StepSpan(CPU))
        clock.append(ended)
        spans[-1].end()
    chunks = (chunk("a", is_last=True), chunk("b", is_last=False))
    clock.append(103.0)
    log.record(SchedulerOutputs(1, StepKind.PREFILL, 16, ("a", "b"), chunks), spans[0])
    log.record(SchedulerOutputs(2, StepKind.DECODE, 4, ("a",)), spans[1])
    prefill, decode = log.times
    assert (prefill.step, prefill.kind, prefill.bucket, prefill.ms) == (1, StepKind.PREFILL, 16, 1500.0)
    assert prefill.request_ids == ("a",), "only a completed prompt gets a token"
    assert prefill.gap_ms is None and prefill.read_back == decode.read_back == 103.0
    assert (decode.ms, decode.gap_ms, decode.request_ids) == (250.0, 500.0, ("a",))


def test_times_are_a_snapshot() -> None:
    log = StepLog()
    assert log.times == ()
    before = log.times
    log.record(SchedulerOutputs(1, StepKind.DECODE, 1, ("a",)), StepSpan(CPU))
    assert before == () and len(log.times) == 1


@pytest.mark.gpu
def test_spans_on_a_gpu() -> None:
    """The device's own time, whenever the host asks: 10 ms of sleep on the GPU, and the gap between two of them."""
    device = torch.device("cuda", torch.cuda.current_device())
    cycles = 20_000_000
    torch.cuda._sleep(1)  # the first launch loads the kernel
    torch.cuda.synchronize()
    log, spans = StepLog(), []
    begun = time.perf_counter()
    for _ in range(2):
        spans.append(StepSpan(device))
        torch.cuda._sleep(cycles)
        spans[-1].end()
        torch.cuda._sleep(cycles // 4)
    launched = time.perf_counter() - begun
    torch.cuda.synchronize()
    waited = time.perf_counter() - begun
    for number, span in enumerate(spans):
        log.record(SchedulerOutputs(number + 1, StepKind.DECODE, 1, ("a",)), span)
    first, second = log.times
    assert launched < waited / 2, "marking the spans waited for the device"
    assert 4 < first.ms < 1e3 * waited and second.ms == pytest.approx(first.ms, rel=0.3)
    assert second.gap_ms == pytest.approx(first.ms / 4, rel=0.5)
