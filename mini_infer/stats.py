"""Puts the engine's counts together."""

from __future__ import annotations

from mini_infer.metrics import EngineStats
from mini_infer.startup import EngineParts
from mini_infer.step import StepKind
from mini_infer.step_loop import StepLoop


def snapshot(parts: EngineParts, loop: StepLoop) -> EngineStats:
    """Counts, padding, memory and start-up as they are now."""
    scheduler, manager = parts.scheduler, parts.scheduler.block_manager
    return EngineStats(
        num_running=scheduler.num_running,
        num_prefilling=scheduler.num_prefilling,
        num_waiting=scheduler.num_waiting,
        num_finished=loop.num_finished,
        prompt_tokens=loop.prompt_tokens,
        cached_prompt_tokens=loop.cached_prompt_tokens,
        output_tokens=loop.output_tokens,
        prefill_steps=loop.num_steps[StepKind.PREFILL],
        decode_steps=loop.num_steps[StepKind.DECODE],
        off_graph_steps=parts.runner.off_graph_steps,
        preemptions=dict(scheduler.num_preemptions),
        kv_blocks_used=manager.num_used_blocks,
        kv_blocks_total=manager.num_gpu_blocks,
        kv_blocks_cached=manager.num_cached_blocks,
        decode_buckets=scheduler.decode_padding.by_bucket,
        prefill_buckets=scheduler.prefill_padding.by_bucket,
        decode_padding=scheduler.decode_padding.waste,
        prefill_padding=scheduler.prefill_padding.waste,
        decode_costs=dict(scheduler.decode_buckets.costs),
        prefill_costs=dict(scheduler.prefill_buckets.costs),
        context_ms_per_token=scheduler.context_ms_per_token,
        costs_measured=scheduler.decode_buckets.measured,
        memory=parts.plan,
        graphs=parts.graphs,
        plan_loaded=parts.plan_loaded,
        startup=parts.report,
        step_times=loop.step_times,
    )
