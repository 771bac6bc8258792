"""What the engine tells of itself: how its start went, and what its steps were. Pure data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from mini_infer.buckets import BucketUse
from mini_infer.memory.plan import MemoryPlan
from mini_infer.step import CaptureRecord, StepKind


class PhaseClock:
    """Cuts the time since its making into named phases that leave no gap."""

    def __init__(self) -> None:
        self._begun = self._last = time.perf_counter()
        self._phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """End a phase: everything since the last mark belongs to it."""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def report(self) -> StartupReport:
        """The phases so far."""
        return StartupReport(dict(self._phases), self._last - self._begun)


@dataclass(frozen=True, slots=True)
class StartupReport:
    """How long the engine took to start.

    Attributes:
        phases: Seconds by phase, in order; they add up to ``total``.
        total: Seconds from the first line of the constructor to its last.
    """

    phases: dict[str, float]
    total: float

    def describe(self) -> str:
        """One line for people."""
        return f"started in {self.total:.2f} s: " + ", ".join(f"{k} {v:.2f}" for k, v in self.phases.items())


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step as it ran.

    Attributes:
        step: Its number.
        kind: Prefill or decode.
        bucket: Padded rows or tokens.
        request_ids: The requests that got a token from it.
        ms: Milliseconds on the device. Those of a prefill step include the copy of its inputs.
        gap_ms: Milliseconds on the device between the end of the step before and the beginning of this one; None for
            the first step.
        read_back: When its tokens had arrived, in seconds of `time.perf_counter`.
    """

    step: int
    kind: StepKind
    bucket: int
    request_ids: tuple[str, ...]
    ms: float
    gap_ms: float | None
    read_back: float


def median_step_ms(times: Iterable[StepTime], kind: StepKind) -> dict[int, float]:
    """Median milliseconds on the device by bucket, of the steps of one kind."""
    by_bucket: dict[int, list[float]] = {}
    for step in times:
        if step.kind is kind:
            by_bucket.setdefault(step.bucket, []).append(step.ms)
    return {bucket: median(ms) for bucket, ms in sorted(by_bucket.items())}


def idle_share(times: Sequence[StepTime]) -> float | None:
    """Share of the steady state in which the device ran no step, 0 to 1; None if there was no steady state.

    The steady state is the decode steps that had the same rows as the step before them, each with the gap before it.
    """
    gaps = total = 0.0
    for before, step in pairwise(times):
        if step.kind is before.kind is StepKind.DECODE and step.request_ids == before.request_ids:
            assert step.gap_ms is not None, "only the first step has no gap"
            gaps += step.gap_ms
            total += step.gap_ms + step.ms
    return gaps / total if total else None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine.

    Attributes:
        num_running, num_prefilling, num_waiting: Requests by state; ``num_waiting`` includes swapped ones.
        num_finished: Requests that ended, aborted ones included.
        prompt_tokens: Prompt tokens computed, recomputed ones included.
        cached_prompt_tokens: Prompt tokens that the prefix cache had already.
        output_tokens: Tokens generated.
        prefill_steps, decode_steps: Steps run.
        off_graph_steps: Steps on a GPU that were not a replay of a captured graph.
        preemptions: How often a sequence lost its place, by "swap" and "recompute".
        kv_blocks_used, kv_blocks_total: KV cache blocks on the device.
        kv_blocks_cached: Blocks whose content later prompts can use.
        decode_buckets, prefill_buckets: How each bucket was used.
        decode_padding, prefill_padding: Share of rows (tokens) that were padding, 0 to 1.
        decode_costs, prefill_costs: Milliseconds of one step by bucket; those of decode over rows without context.
        context_ms_per_token: Milliseconds that each token of the rows' contexts adds to a decode step.
        costs_measured: False if the costs are only assumed proportional to size.
        memory: Where the memory went.
        graphs: What each captured graph cost to make.
        plan_loaded: True if the start measured nothing, because an earlier one had.
        startup: How long the start took.
        step_times: Every step that was read back, oldest first, if ``EngineConfig.measure_steps`` is on.
    """

    num_running: int
    num_prefilling: int
    num_waiting: int
    num_finished: int
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    prefill_steps: int
    decode_steps: int
    off_graph_steps: int
    preemptions: dict[str, int]
    kv_blocks_used: int
    kv_blocks_total: int
    kv_blocks_cached: int
    decode_buckets: dict[int, BucketUse]
    prefill_buckets: dict[int, BucketUse]
    decode_padding: float
    prefill_padding: float
    decode_costs: dict[int, float]
    prefill_costs: dict[int, float]
    context_ms_per_token: float
    costs_measured: bool
    memory: MemoryPlan
    graphs: tuple[CaptureRecord, ...]
    plan_loaded: bool
    startup: StartupReport
    step_times: tuple[StepTime, ...] = field(repr=False)
