"""Running a workload on an engine and saying what came of it."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mini_infer
from mini_infer.bench import workloads
from mini_infer.bench.workloads import Work
from mini_infer.engine import LLMEngine
from mini_infer.metrics import EngineStats


def environment() -> dict[str, str]:
    """Hardware and versions, for the output of every benchmark."""
    cuda = torch.cuda.is_available()
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "mini_infer": mini_infer.__version__,
        "commit": commit or "unknown",
    }


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "none"


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """Decode time at one batch size.

    Attributes:
        batch: Requests at once.
        decode_ms: Best milliseconds of one decode step, (t(128 tokens) - t(1 token)) / 127.
        median_ms: The median over the repeats.
        ttft_ms: Best milliseconds to generate one token for all of them.
        off_graph_steps: Steps that were not a replay.
    """

    batch: int
    decode_ms: float
    median_ms: float
    ttft_ms: float
    off_graph_steps: int


def bench_latency(
    engine: LLMEngine, batches: Sequence[int], *, output_tokens: int = 128, repeats: int = 3
) -> list[LatencyRow]:
    """Milliseconds of a decode step at each batch size, as the latency workload defines it."""
    rows = []
    for batch in batches:
        long, short = workloads.latency(batch, output_tokens), workloads.latency(batch, 1)
        _timed(engine, long)  # warm-up
        off_graph = engine.stats().off_graph_steps
        long_s = [_timed(engine, long) for _ in range(repeats)]
        short_s = [_timed(engine, short) for _ in range(repeats)]
        steps = output_tokens - 1
        rows.append(
            LatencyRow(
                batch=batch,
                decode_ms=(min(long_s) - min(short_s)) / steps * 1e3,
                median_ms=(median(long_s) - median(short_s)) / steps * 1e3,
                ttft_ms=min(short_s) * 1e3,
                off_graph_steps=engine.stats().off_graph_steps - off_graph,
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """What an offline run came to.

    Attributes:
        wall_s: Seconds from the first request to the last token.
        prompt_tokens, output_tokens: Tokens of the workload.
        prompt_tokens_per_s, output_tokens_per_s: The same over ``wall_s``.
        decode_padding, prefill_padding: Share of padded rows (tokens).
        off_graph_steps: Steps that were not a replay.
        decode_steps, prefill_steps: Steps of each kind.
    """

    wall_s: float
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    decode_padding: float
    prefill_padding: float
    off_graph_steps: int
    decode_steps: int
    prefill_steps: int


def bench_throughput(engine: LLMEngine, work: Work, *, warm_up: bool = True) -> ThroughputResult:
    """Run a workload whose requests are all there at once."""
    if warm_up:
        _timed(engine, workloads.latency(2, 4))
    before = engine.stats()
    wall = _timed(engine, work)
    after = engine.stats()
    return ThroughputResult(
        wall_s=wall,
        prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens,
        prompt_tokens_per_s=work.prompt_tokens / wall,
        output_tokens_per_s=work.output_tokens / wall,
        decode_padding=after.decode_padding,
        prefill_padding=after.prefill_padding,
        off_graph_steps=after.off_graph_steps - before.off_graph_steps,
        decode_steps=after.decode_steps - before.decode_steps,
        prefill_steps=after.prefill_steps - before.prefill_steps,
    )


def bucket_table(stats: EngineStats) -> str:
    """How each decode bucket was used: steps, real and padded rows, what padding cost."""
    lines = [f"{'bucket':>7}{'steps':>8}{'rows':>9}{'padded':>9}{'padding ms':>12}{'cost ms':>9}"]
    for bucket, use in stats.decode_buckets.items():
        cost = stats.decode_costs[bucket]
        lines.append(f"{bucket:>7}{use.steps:>8}{use.rows:>9}{use.padded:>9}{use.padding_ms:>12.1f}{cost:>9.3f}")
    return "\n".join(lines)


def last_line(name: str, model: str, results: Any) -> str:
    """The JSON object that every benchmark prints last."""
    if isinstance(results, list):
        results = [asdict(row) for row in results]
    elif not isinstance(results, dict):
        results = asdict(results)
    return json.dumps({"benchmark": name, "model": model, **environment(), "results": results})


def _timed(engine: LLMEngine, work: Work) -> float:
    """Seconds to generate a whole workload."""
    begun = time.perf_counter()
    outputs = engine.generate(work.prompts, sampling_params=work.sampling)
    wall = time.perf_counter() - begun
    for output, params in zip(outputs, work.sampling, strict=True):
        assert len(output.token_ids) == params.max_tokens, f"{output.request_id}: {output.error}"
    return wall
