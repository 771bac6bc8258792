"""Runs ``mini-infer bench``: benchmarks with dummy weights of a real shape. The last line is one JSON object."""

from __future__ import annotations

import argparse
from typing import Any

from mini_infer.bench import workloads
from mini_infer.bench.run import bench_latency, bench_throughput, bucket_table, environment, last_line
from mini_infer.bench.startup import bench_startup
from mini_infer.config import EngineConfig
from mini_infer.engine import LLMEngine


def run(arguments: argparse.Namespace) -> None:
    """Run one benchmark and print its table."""
    for name, value in environment().items():
        print(f"{name:<12}{value}")
    options: dict[str, Any] = {
        "model": workloads.shape_folder(arguments.model),
        "load_format": "dummy",
        "dtype": arguments.dtype,
        "max_num_seqs": arguments.max_num_seqs,
        "max_model_len": arguments.max_model_len,
        "steps_in_flight": arguments.steps_in_flight,
        "prefill_share": arguments.prefill_share,
        "capture_graphs": not arguments.eager,
        "enable_prefix_caching": False,  # a repeated workload would find itself
        "num_cpu_blocks": 0,
        "progress": False,
    }
    if arguments.benchmark == "startup":
        _startup(arguments.model, options)
        return
    with LLMEngine(EngineConfig(**options)) as engine:
        print(engine.stats().startup.describe())
        print(engine.stats().memory.describe())
        if arguments.benchmark == "latency":
            _latency(engine, arguments.model, arguments.batch or workloads.latency_batches())
        else:
            _throughput(engine, arguments.model, arguments.benchmark)


def _latency(engine: LLMEngine, model: str, batches: list[int]) -> None:
    rows = bench_latency(engine, batches)
    print(f"{'batch':>6}{'decode ms':>11}{'median':>9}{'TTFT ms':>9}{'off graph':>11}")
    for row in rows:
        print(f"{row.batch:>6}{row.decode_ms:>11.3f}{row.median_ms:>9.3f}{row.ttft_ms:>9.1f}{row.off_graph_steps:>11}")
    print(last_line("latency", model, rows))


def _throughput(engine: LLMEngine, model: str, name: str) -> None:
    result = bench_throughput(engine, workloads.THROUGHPUT[name]())
    print(bucket_table(engine.stats()))
    print(
        f"{result.wall_s:.2f} s, {result.prompt_tokens_per_s:,.0f} prompt tok/s, "
        f"{result.output_tokens_per_s:,.0f} output tok/s, padding {result.decode_padding:.1%}, "
        f"{result.off_graph_steps} steps off the graphs"
    )
    print(last_line(name, model, result))


def _startup(model: str, options: dict[str, Any]) -> None:
    rows = bench_startup(options)
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row.phases.items())
        print(f"{row.caches}: {row.wall_s:.2f} s to the first token ({phases})")
    print(last_line("startup", model, rows))
