"""Runs ``mini-infer bench``: benchmarks with dummy weights of a real shape. Each ends with a line of JSON."""

from __future__ import annotations

import argparse
import math
from typing import Any

from mini_infer.bench import workloads
from mini_infer.bench.arrivals import ArrivalResult, Distribution, bench_arrivals
from mini_infer.bench.compare import PolicyRow, compare_buckets
from mini_infer.bench.report import StepSummary, bucket_table, environment, last_line, percent
from mini_infer.bench.run import LatencyRow, ThroughputResult, bench_latency, bench_throughput
from mini_infer.bench.startup import StartupRow, bench_startup
from mini_infer.config import EngineConfig
from mini_infer.engine import LLMEngine
from mini_infer.exceptions import ConfigError

WITH_ARRIVALS = ("sharegpt-1500", "compare-buckets")
WITH_REPEATS = (*workloads.THROUGHPUT, "compare-buckets")
ALONE = ("compare-buckets", "startup")
"""Benchmarks that start engines of their own."""


def run(arguments: argparse.Namespace) -> None:
    """Run the benchmarks and print their tables.

    Raises:
        ConfigError: options that do not go with the benchmarks, or with each other.
    """
    _check(arguments)
    for name, value in environment().items():
        print(f"{name:<12}{value}")
    options: dict[str, Any] = {
        "model": workloads.shape_folder(arguments.model),
        "load_format": "dummy",
        "seed": 0,
        "dtype": arguments.dtype,
        "max_num_seqs": arguments.max_num_seqs,
        "max_model_len": arguments.max_model_len,
        "steps_in_flight": arguments.steps_in_flight,
        "prefill_share": arguments.prefill_share,
        "capture_graphs": not arguments.eager,
        "measure_steps": arguments.measure_steps,
        "enable_prefix_caching": False,  # a repeated workload would find itself
        "num_cpu_blocks": 0,
        "progress": False,
    }
    if arguments.benchmark == ["compare-buckets"]:
        _print_last(arguments, options, "compare-buckets", _compare_buckets(arguments, options))
    elif arguments.benchmark == ["startup"]:
        _print_last(arguments, options, "startup", _startup(options))
    else:
        with LLMEngine(EngineConfig(**options)) as engine:
            print(engine.stats().startup.describe())
            print(engine.stats().memory.describe())
            for name in arguments.benchmark:
                results = _latency(engine, arguments) if name == "latency" else _workload(engine, arguments, name)
                _print_last(arguments, options, name, results)


def _check(arguments: argparse.Namespace) -> None:
    names, rate, repeats = arguments.benchmark, arguments.rate, arguments.repeats
    if len(names) > 1 and not set(names).isdisjoint(ALONE):
        raise ConfigError(f"{' and '.join(ALONE)} start engines of their own and run alone, got {' '.join(names)}")
    if rate is not None:
        if not set(names) <= set(WITH_ARRIVALS):
            raise ConfigError(f"--rate goes with {' and '.join(WITH_ARRIVALS)}, got {' '.join(names)}")
        if not 0 < rate < math.inf:
            raise ConfigError(f"--rate must be a positive number of requests a second, got {rate}")
        if not arguments.measure_steps:
            raise ConfigError("--rate needs --measure-steps: the times of tokens are those of their steps")
    wrong = [batch for batch in arguments.batch or () if not 1 <= batch <= arguments.max_num_seqs]
    if wrong:
        raise ConfigError(f"--batch must be between 1 and --max-num-seqs={arguments.max_num_seqs}, got {wrong[0]}")
    if arguments.batch and "latency" not in names:
        raise ConfigError(f"--batch goes with latency, got {' '.join(names)}")
    if repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, got {repeats}")
    if repeats > 1 and (rate is not None or set(names).isdisjoint(WITH_REPEATS)):
        raise ConfigError(f"--repeats goes with {', '.join(WITH_REPEATS)}, and not with --rate")


def _print_last(arguments: argparse.Namespace, options: dict[str, Any], name: str, results: Any) -> None:
    print(last_line(name, {**options, "model": arguments.model, "rate": arguments.rate}, results))


def _latency(engine: LLMEngine, arguments: argparse.Namespace) -> list[LatencyRow]:
    most = arguments.max_num_seqs
    rows = bench_latency(engine, arguments.batch or [each for each in workloads.latency_batches() if each <= most])
    print(f"{'batch':>6}{'decode ms':>11}{'median':>9}{'TTFT ms':>9}{'GPU idle':>10}{'off graph':>11}")
    for row in rows:
        print(
            f"{row.batch:>6}{row.decode_ms:>11.3f}{row.median_ms:>9.3f}{row.ttft_ms:>9.1f}"
            f"{percent(row.gpu_idle):>10}{row.off_graph_steps:>11}"
        )
    return rows


def _workload(engine: LLMEngine, arguments: argparse.Namespace, name: str) -> ThroughputResult | ArrivalResult:
    if arguments.rate is not None:
        arrived, usage = bench_arrivals(engine, workloads.sharegpt_1500(arguments.rate))
        print(bucket_table(usage.buckets))
        _print_arrivals(arrived)
        return arrived
    result, usage = bench_throughput(engine, workloads.THROUGHPUT[name](), repeats=arguments.repeats)
    print(bucket_table(usage.buckets))
    runs = f", median of {len(result.walls_s)}, spread {result.spread:.1%}" if len(result.walls_s) > 1 else ""
    print(
        f"{result.wall_s:.2f} s{runs}: {result.prompt_tokens_per_s:,.0f} prompt tok/s, "
        f"{result.output_tokens_per_s:,.0f} output tok/s, {_describe(result.steps)}"
    )
    return result


def _print_arrivals(result: ArrivalResult) -> None:
    print(f"{'ms':<8}{'mean':>10}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'largest':>10}")
    for name, spread in (("TTFT", result.ttft_ms), ("ITL", result.itl_ms), ("latency", result.latency_ms)):
        print(_distribution(name, spread))
    print(
        f"{result.wall_s:.2f} s: {result.requests_per_s:.2f} requests/s, {result.output_tokens_per_s:,.0f} output "
        f"tok/s, {_describe(result.steps)}"
    )


def _distribution(name: str, spread: Distribution) -> str:
    values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.largest)
    return f"{name:<8}" + "".join(f"{value:>10.2f}" for value in values)


def _describe(steps: StepSummary) -> str:
    return (
        f"padding {steps.decode_padding:.1%} of the rows, {steps.padding_ms:,.0f} ms; GPU idle "
        f"{percent(steps.gpu_idle)} of the steady state; {steps.off_graph_steps} steps off the graphs"
    )


def _compare_buckets(arguments: argparse.Namespace, options: dict[str, Any]) -> list[PolicyRow]:
    work = workloads.sharegpt_1500(arguments.rate)
    rows = compare_buckets(options, work, repeats=arguments.repeats, done=lambda policy: print(f"done: {policy}"))
    print(
        f"{'policy':<10}{'sizes':>6}{'wall s':>9}{'tok/s':>9}{'ITL ms':>8}{'steps':>8}{'padded':>9}"
        f"{'padding ms':>12}{'gain':>8}"
    )
    for row in rows:
        print(_policy(row))
    return rows


def _policy(row: PolicyRow) -> str:
    result, steps = row.result, row.result.steps
    itl = f"{result.itl_ms.mean:.2f}" if isinstance(result, ArrivalResult) else "-"
    return (
        f"{row.policy:<10}{len(row.decode_buckets):>6}{result.wall_s:>9.2f}{result.output_tokens_per_s:>9,.0f}{itl:>8}"
        f"{steps.decode_steps:>8}{steps.padded_rows:>9}{steps.padding_ms:>12.1f}{row.gain:>+8.1%}"
    )


def _startup(options: dict[str, Any]) -> list[StartupRow]:
    rows = bench_startup(options)
    for row in rows:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row.phases.items())
        print(f"{row.caches}: {row.wall_s:.2f} s to the first token ({phases})")
    return rows
