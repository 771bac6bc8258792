"""What the engine tells of itself: how its start went, and what its steps were. Pure data."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mini_infer.buckets import BucketUse
from mini_infer.memory.plan import MemoryPlan
from mini_infer.step import CaptureRecord


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
        decode_costs, prefill_costs: Milliseconds of one step by bucket.
        costs_measured: False if the costs are only assumed proportional to size.
        memory: Where the memory went.
        graphs: What each captured graph cost to make.
        plan_loaded: True if the start measured nothing, because an earlier one had.
        startup: How long the start took.
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
    costs_measured: bool
    memory: MemoryPlan
    graphs: tuple[CaptureRecord, ...]
    plan_loaded: bool
    startup: StartupReport
