"""Warm up for a model and configuration: compile the kernels, capture every step, time it, and keep what was measured.

    python scripts/capture_graphs.py --model path/or/name --dtype bfloat16 --max-num-seqs 256
    python scripts/capture_graphs.py --model path/or/name --dtype bfloat16 --max-num-seqs 256 --check

The next start of an `LLMEngine` with the same options measures nothing. With ``--check`` nothing is changed: the kept
measurements are compared with new ones, and the exit status is 1 if there are none, or if a step is off by more than
the tolerance. Kernels compile into Triton's own cache.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mini_infer import EngineConfig, LLMEngine
from mini_infer.bench.plotting import load_pyplot
from mini_infer.bench.workloads import shape_folder
from mini_infer.buckets import BucketTable
from mini_infer.config import DTYPES, LOAD_FORMATS
from mini_infer.exceptions import ConfigError, MiniInferError
from mini_infer.machine_plan import MachinePlan
from mini_infer.metrics import EngineStats
from mini_infer.shape import Shape
from mini_infer.startup import machine_plans
from mini_infer.step import StepKind

MIB = 1 << 20


def main() -> int:
    """Capture, measure, print and keep; or check. Returns the exit status."""
    arguments = parse()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING)
    try:
        return run(arguments)
    except MiniInferError as error:
        print(f"capture_graphs: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Do what the arguments say."""
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU: steps are captured as CUDA graphs, which a CPU does not have")
    pyplot = load_pyplot(arguments.plot) if arguments.plot else None
    config = EngineConfig(
        model=shape_folder(arguments.model),
        dtype=arguments.dtype,
        max_num_seqs=arguments.max_num_seqs,
        max_prefill_tokens=arguments.max_prefill_tokens,
        max_prefill_seqs=arguments.max_prefill_seqs,
        max_model_len=arguments.max_model_len,
        block_size=arguments.block_size,
        load_format=arguments.load_format,
        decode_buckets=arguments.decode_buckets,
        prefill_buckets=arguments.prefill_buckets,
    )
    shape = Shape.of(config)
    store, key = machine_plans(), shape.plan_key()
    kept = store.load(key)
    if arguments.check and kept is None:
        print(f"no plan is kept for this model, configuration and machine ({store.path(key)})")
        return 1
    with TemporaryDirectory() as scratch:
        if arguments.check:
            os.environ["MINI_INFER_HOME"] = scratch  # measure as on a first start, and keep none of it
        else:
            store.path(key).unlink(missing_ok=True)
        with LLMEngine(config) as engine:
            stats = engine.stats()
        plan = machine_plans().load(key)  # of this start; None if it could not be kept
    print_table(stats)
    print(f"\n{stats.startup.describe()}\n\n{stats.memory.describe()}")
    if arguments.plot:
        plot(pyplot, stats.decode_costs, stats.decode_costs if plan is None else plan.decode_ms, arguments.plot)
        print(f"\nplot: {arguments.plot}")
    if arguments.check:
        measured = step_costs(stats)
        assert kept is not None
        return compare(kept, measured, arguments.tolerance)
    print(f"\nkept in {store.path(key)}")
    return 0


def step_costs(stats: EngineStats) -> dict[StepKind, dict[int, float]]:
    """Milliseconds of every bucket, by kind."""
    return {StepKind.DECODE: stats.decode_costs, StepKind.PREFILL: stats.prefill_costs}


def compare(kept: MachinePlan, measured: dict[StepKind, dict[int, float]], tolerance: float) -> int:
    """Print how the kept costs compare with new ones. Returns the exit status."""
    worst = 0.0
    for kind, costs in ((StepKind.DECODE, kept.decode_ms), (StepKind.PREFILL, kept.prefill_ms)):
        # What a size without a bucket costs now is not known.
        for bucket, cost in ((bucket, cost) for bucket, cost in costs.items() if bucket in measured[kind]):
            off = measured[kind][bucket] / cost - 1
            worst = max(worst, abs(off))
            if abs(off) > tolerance:
                print(f"{kind.value} {bucket}: kept {cost:.3f} ms, now {measured[kind][bucket]:.3f} ms ({off:+.0%})")
    fits = worst <= tolerance
    print(f"the kept plan {'fits' if fits else 'does not fit'}: at most {worst:.0%} off, {tolerance:.0%} allowed")
    return 0 if fits else 1


def print_table(stats: EngineStats) -> None:
    """One line for each graph: what it took to make, and what a step costs."""
    print(f"{'step':<9}{'bucket':>7}{'capture ms':>12}{'MiB':>8}{'step ms':>10}{'ms/row':>10}")
    for record in sorted(stats.graphs, key=lambda r: (r.kind.value, r.bucket)):
        step = f"{'-':>10}{'-':>10}"
        if record.step_ms is not None:
            step = f"{record.step_ms:>10.3f}{record.step_ms / record.bucket:>10.4f}"
        print(f"{record.kind.value:<9}{record.bucket:>7}{record.seconds * 1e3:>12.1f}{record.bytes / MIB:>8.1f}{step}")
    seconds, size = sum(r.seconds for r in stats.graphs), sum(r.bytes for r in stats.graphs)
    print(f"{len(stats.graphs)} graphs: {seconds:.2f} s, {size / MIB:.0f} MiB")
    print("a default bucket that is not listed saved too little over the next larger one")


def plot(pyplot: Any, buckets: dict[int, float], measured: dict[int, float], path: Path) -> None:
    """Decode step time against batch size, with what rounding up to the next bucket costs shaded.

    Args:
        pyplot: What `load_pyplot` gave.
        buckets: Milliseconds of a step by bucket.
        measured: The same of every size that was measured, those that have no bucket included.
        path: Where the picture goes.
    """
    figure, axes = pyplot.subplots(figsize=(9, 5))
    table = BucketTable(buckets, max(buckets), measured)
    rows = range(1, table.largest + 1)
    rounded = [table.cost(row) for row in rows]
    ideal = [table.exact_cost(row) for row in rows]
    axes.plot(rows, rounded, drawstyle="steps-pre", label="the step that runs (next bucket)")
    axes.plot(*zip(*sorted(measured.items()), strict=True), "o", markersize=3, fillstyle="none", label="measured")
    axes.plot(*zip(*sorted(buckets.items()), strict=True), "o", markersize=3, label="buckets")
    # Where a larger bucket is cheaper than the exact one, the scheduler takes it, and rounding up loses nothing.
    lost = [max(ran, exact_cost) for ran, exact_cost in zip(rounded, ideal, strict=True)]
    axes.fill_between(rows, ideal, lost, step="pre", alpha=0.3, label="lost to rounding up")
    axes.set(xlabel="sequences in the batch", ylabel="decode step, ms", title="Decode step time by batch size")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face name, local folder, or a bundled shape")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="type of weights and KV cache")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="most sequences at once")
    parser.add_argument("--max-prefill-tokens", type=int, help="most prompt tokens of one step")
    parser.add_argument("--max-prefill-seqs", type=int, default=64, help="most prompts of one step")
    parser.add_argument("--max-model-len", type=int, help="most tokens of one sequence")
    parser.add_argument("--block-size", type=int, default=16, help="tokens per KV cache block")
    parser.add_argument("--load-format", choices=LOAD_FORMATS, default="auto", help="dummy: random weights")
    parser.add_argument("--decode-buckets", type=int, nargs="+", help="batch sizes to capture")
    parser.add_argument("--prefill-buckets", type=int, nargs="+", help="token counts to capture")
    parser.add_argument("--check", action="store_true", help="compare the kept plan with new measurements")
    parser.add_argument("--tolerance", type=float, default=0.15, help="how far off --check lets a step be")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot of step time against batch size")
    parser.add_argument("--verbose", action="store_true", help="log the start")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
