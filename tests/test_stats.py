"""Every count comes from where it is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mini_infer.buckets import BucketTable
from mini_infer.output_processor import OutputProcessor
from mini_infer.scheduler import Scheduler
from mini_infer.stats import snapshot
from mini_infer.step import StepKind
from mini_infer.step_loop import StepLoop


def test_a_snapshot() -> None:
    """Of numbers that are all different, so that none is taken for another; it stays as it was."""
    scheduler = Scheduler(
        2,
        64,
        16,
        num_gpu_blocks=11,
        decode_buckets=BucketTable([2], 2, {2: 1.5}),
        prefill_buckets=BucketTable([64], 64, {64: 2.5}),
        context_ms_per_token=0.125,
    )
    runner: Any = SimpleNamespace(off_graph_steps=6)
    loop = StepLoop(scheduler, runner, OutputProcessor(None), 1)
    loop.num_finished, loop.prompt_tokens, loop.cached_prompt_tokens, loop.output_tokens = 1, 2, 3, 4
    loop.num_steps.update({StepKind.PREFILL: 5, StepKind.DECODE: 7})
    of_the_start: dict[str, Any] = {"plan": "plan", "graphs": ("graph",), "plan_loaded": True, "report": "report"}
    parts: Any = SimpleNamespace(scheduler=scheduler, runner=runner, **of_the_start)
    scheduler.prefill_padding.count(48, 64, 2.5)
    scheduler.decode_padding.count(1, 2, 1.5)
    stats = snapshot(parts, loop)
    assert (stats.num_finished, stats.prompt_tokens, stats.cached_prompt_tokens, stats.output_tokens) == (1, 2, 3, 4)
    assert (stats.prefill_steps, stats.off_graph_steps, stats.decode_steps) == (5, 6, 7)
    assert (stats.prefill_padding, stats.decode_padding) == (0.25, 0.5)
    assert (list(stats.prefill_buckets), list(stats.decode_buckets)) == ([64], [2])
    assert (stats.prefill_costs, stats.decode_costs, stats.costs_measured) == ({64: 2.5}, {2: 1.5}, True)
    assert (stats.kv_blocks_used, stats.kv_blocks_total, stats.kv_blocks_cached) == (0, 11, 0)
    assert stats.context_ms_per_token == 0.125
    assert stats.preemptions == {"swap": 0, "recompute": 0}
    assert [stats.memory, stats.graphs, stats.plan_loaded, stats.startup] == [*of_the_start.values()]
    assert stats.step_times == ()
    loop.num_finished += 1
    assert stats.num_finished == 1
