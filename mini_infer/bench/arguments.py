"""The arguments of ``mini-infer bench``; apart from what runs it, so that help does not wait for torch."""

from __future__ import annotations

import argparse

from mini_infer.bench import workloads
from mini_infer.config import DTYPES

BENCHMARKS = ("latency", *workloads.THROUGHPUT, "compare-buckets", "startup")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "benchmark", nargs="+", choices=BENCHMARKS, help="what to run: several share one engine, but for the last two"
    )
    names = ", ".join(workloads.shape_names())
    parser.add_argument("--model", default="qwen3-0.6b", help=f"a shape ({names}), or the folder of a config.json")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes of the latency benchmark")
    parser.add_argument(
        "--rate",
        type=float,
        help="sharegpt-1500, compare-buckets: requests a second, with exponential gaps; without it all come at once",
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs of a workload whose requests are there at once")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="type of weights and KV cache")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="most sequences at once")
    parser.add_argument("--max-model-len", type=int, default=4096, help="most tokens of one sequence")
    parser.add_argument("--steps-in-flight", type=int, help="steps launched before the first one's tokens are read")
    parser.add_argument("--prefill-share", type=float, default=0.97, help="share of the time for waiting prompts")
    parser.add_argument("--eager", action="store_true", help="run without captured graphs")
    parser.add_argument(
        "--measure-steps",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time every step on the device (two events for each)",
    )
