"""One workload on engines that differ in nothing but their buckets: what choosing them by cost is worth."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mini_infer.bench.arrivals import ArrivalResult, bench_arrivals
from mini_infer.bench.run import ThroughputResult, bench_throughput
from mini_infer.bench.workloads import Work
from mini_infer.config import EngineConfig
from mini_infer.engine import LLMEngine
from mini_infer.shape import Shape


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A workload under one way of choosing buckets.

    Attributes:
        policy: "cost" (default sizes, of which those stay that save time; the cheapest that fits), "round up" (every
            default size; the next larger one), or "by 16" (1, 2, 4, 8 and the multiples of 16; the next larger one).
        decode_buckets: The decode buckets that the engine had.
        time_s: What policies are compared by: seconds of the whole workload if its requests are there at once, the
            mean seconds of a request from arrival to end if they arrive over time.
        gain: How much longer the workload takes this way than by "cost", as a share of the time by "cost".
        result: All figures.
    """

    policy: str
    decode_buckets: tuple[int, ...]
    time_s: float
    gain: float
    result: ThroughputResult | ArrivalResult


def compare_buckets(
    options: dict[str, Any], work: Work, *, repeats: int = 1, done: Callable[[str], object] = lambda policy: None
) -> list[PolicyRow]:
    """Run a workload with each policy.

    Args:
        options: Keywords of `EngineConfig`, with ``measure_steps`` on if the workload has arrivals.
        work: The workload.
        repeats: How often to run it with each; with arrivals it is run once.
        done: Called with each policy that is done.
    """
    rows: list[PolicyRow] = []
    for policy, buckets in policies(EngineConfig(**options)).items():
        with LLMEngine(EngineConfig(**{**options, **buckets})) as engine:
            sizes = tuple(engine.stats().decode_costs)
            result: ThroughputResult | ArrivalResult
            if work.arrivals is None:
                result, _ = bench_throughput(engine, work, repeats=repeats)
                seconds = result.wall_s
            else:
                result, _ = bench_arrivals(engine, work)
                seconds = result.latency_ms.mean / 1e3
        gc.collect()  # the next engine needs the memory
        gain = seconds / rows[0].time_s - 1 if rows else 0.0
        rows.append(PolicyRow(policy, sizes, seconds, gain, result))
        done(policy)
    return rows


def policies(config: EngineConfig) -> dict[str, dict[str, Any]]:
    """The bucket options of each policy, the one by cost first. Listed sizes stay, whatever they cost."""
    shape = Shape.of(config)
    prefill = {"prefill_buckets": shape.prefill_sizes, "bucket_policy": "round_up"}
    sixteens = (1, 2, 4, 8, *range(16, config.max_num_seqs + 1, 16))
    return {
        "cost": {"bucket_policy": "cost"},
        "round up": {"decode_buckets": shape.decode_sizes, **prefill},
        "by 16": {"decode_buckets": sixteens, **prefill},
    }
