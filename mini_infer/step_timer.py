"""Times steps on the device's own clock. The host never waits for it."""

from __future__ import annotations

import time
from typing import TypeAlias

import torch

from mini_infer.metrics import StepTime
from mini_infer.step import SchedulerOutputs, StepKind

Moment: TypeAlias = torch.cuda.Event | float
"""A point in the device's work: an event in the stream of a GPU, `time.perf_counter` on a CPU."""


class StepSpan:
    """The time of one step: from its making, just before the launch, to `end`, just after.

    Args:
        device: Where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.begun = _now(device)
        self.ended = self.begun

    def end(self) -> None:
        """The step is launched: what is launched from here on is no part of it."""
        self.ended = _now(self._device)


class StepLog:
    """Keeps the time of every step that was read back."""

    def __init__(self) -> None:
        self._times: list[StepTime] = []
        self._last_ended: Moment | None = None

    def record(self, outputs: SchedulerOutputs, span: StepSpan) -> None:
        """Add a step whose tokens were just read back, so that its span lies behind the device."""
        request_ids = outputs.request_ids
        if outputs.kind is StepKind.PREFILL:
            request_ids = tuple(chunk.request_id for chunk in outputs.chunks if chunk.is_last)
        self._times.append(
            StepTime(
                step=outputs.step,
                kind=outputs.kind,
                bucket=outputs.bucket,
                request_ids=request_ids,
                ms=_ms_between(span.begun, span.ended),
                gap_ms=None if self._last_ended is None else _ms_between(self._last_ended, span.begun),
                read_back=time.perf_counter(),
            )
        )
        self._last_ended = span.ended

    @property
    def times(self) -> tuple[StepTime, ...]:
        """Every step so far, oldest first."""
        return tuple(self._times)


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _ms_between(earlier: Moment, later: Moment) -> float:
    if isinstance(earlier, float) or isinstance(later, float):
        assert isinstance(earlier, float) and isinstance(later, float)
        return (later - earlier) * 1e3
    ms: float = earlier.elapsed_time(later)
    return ms
