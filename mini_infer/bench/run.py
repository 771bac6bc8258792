"""Running a workload whose requests are all there at once, and saying what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low

from mini_infer.bench import workloads
from mini_infer.bench.report import StepSummary, StepUsage
from mini_infer.bench.workloads import Work
from mini_infer.engine import LLMEngine
from mini_infer.exceptions import ConfigError, MiniInferError


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """Decode time at one batch size.

    Attributes:
        batch: Requests at once.
        seed: Seed of the prompts.
        decode_ms: Best milliseconds of one decode step, (t(128 tokens) - t(1 token)) / 127.
        median_ms: The median over the repeats.
        ttft_ms: Best milliseconds to generate one token for all of them.
        gpu_idle: Share of the decode time in which the device ran no step; None if it was not measured.
        off_graph_steps: Steps that were not a replay.
    """

    batch: int
    seed: int
    decode_ms: float
    median_ms: float
    ttft_ms: float
    gpu_idle: float | None
    off_graph_steps: int


def bench_latency(
    engine: LLMEngine, batches: Sequence[int], *, output_tokens: int = 128, repeats: int = 3
) -> list[LatencyRow]:
    """Milliseconds of a decode step at each batch size, as the latency workload defines it."""
    rows = []
    for batch in batches:
        long, short = workloads.latency(batch, output_tokens), workloads.latency(batch, 1)
        timed(engine, long)  # warm-up
        before = engine.stats()
        long_s = [timed(engine, long) for _ in range(repeats)]
        short_s = [timed(engine, short) for _ in range(repeats)]
        summary = StepUsage(before, engine.stats()).summary
        steps = output_tokens - 1
        rows.append(
            LatencyRow(
                batch=batch,
                seed=long.seed,
                decode_ms=(min(long_s) - min(short_s)) / steps * 1e3,
                median_ms=(median(long_s) - median(short_s)) / steps * 1e3,
                ttft_ms=min(short_s) * 1e3,
                gpu_idle=summary.gpu_idle,
                off_graph_steps=summary.off_graph_steps,
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """What an offline workload came to, run once or more: the figures of the run with the median time.

    Attributes:
        seed: Seed of the workload.
        wall_s: Seconds from the first request to the last token.
        walls_s: The same of every run, in order.
        spread: (slowest - fastest) / median of ``walls_s``.
        prompt_tokens, output_tokens: Tokens of the workload.
        prompt_tokens_per_s, output_tokens_per_s: The same over ``wall_s``.
        steps: What the steps came to.
    """

    seed: int
    wall_s: float
    walls_s: tuple[float, ...]
    spread: float
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    steps: StepSummary


def bench_throughput(engine: LLMEngine, work: Work, *, repeats: int = 1) -> tuple[ThroughputResult, StepUsage]:
    """Run a workload whose requests are all there at once.

    Args:
        engine: Idle; it is warmed up here.
        work: The workload.
        repeats: How often to run it.

    Returns:
        The result, and the steps of the run that it describes.
    """
    warm_up(engine)
    runs = []
    for _ in range(repeats):
        before = engine.stats()
        wall = timed(engine, work)
        runs.append((wall, StepUsage(before, engine.stats())))
    walls = [wall for wall, _ in runs]
    wall = median_low(walls)
    usage = runs[walls.index(wall)][1]
    result = ThroughputResult(
        seed=work.seed,
        wall_s=wall,
        walls_s=tuple(walls),
        spread=(max(walls) - min(walls)) / wall,
        prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens,
        prompt_tokens_per_s=work.prompt_tokens / wall,
        output_tokens_per_s=work.output_tokens / wall,
        steps=usage.summary,
    )
    return result, usage


def warm_up(engine: LLMEngine) -> None:
    """Run a few steps of each kind."""
    timed(engine, workloads.latency(2, 4))


def check_lengths(engine: LLMEngine, work: Work) -> None:
    """See that the engine takes the workload's sequences.

    Raises:
        ConfigError: some are longer than its ``max_model_len``.
    """
    longest = max(len(prompt) + params.max_tokens for prompt, params in zip(work.prompts, work.sampling, strict=True))
    if longest > engine.max_model_len:
        raise ConfigError(
            f"the workload has sequences of up to {longest} tokens; max_model_len must be at least that, got "
            f"{engine.max_model_len}"
        )


def timed(engine: LLMEngine, work: Work) -> float:
    """Seconds to generate a whole workload.

    Raises:
        ConfigError: the engine's ``max_model_len`` is too small for it.
    """
    check_lengths(engine, work)
    begun = time.perf_counter()
    outputs = engine.generate(work.prompts, sampling_params=work.sampling)
    wall = time.perf_counter() - begun
    for output, params in zip(outputs, work.sampling, strict=True):
        if len(output.token_ids) != params.max_tokens:
            raise MiniInferError(f"{output.request_id} came to no end: {output.error}")
    return wall
