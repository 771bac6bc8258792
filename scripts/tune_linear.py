"""Measure which kernel and tile each skinny matrix product of a decoder should use on this GPU, and write the plan.

    python scripts/tune_linear.py
    python scripts/tune_linear.py --quick --models 8b --m 1 16 --out plan.json

Every candidate runs as in a step: with the norm, the gate or the residual of its role, captured in a CUDA graph, its
weights out of the cache (the calls rotate among copies that exceed the L2 cache several times). It must agree with
cuBLAS and the kernels beside it before it is timed. The kernels are compiled first, in one process per core, into
Triton's cache. Two products of which one may leave the squares that the other norms with are chosen together.

What is best by itself need not be in a step, where kernels overlap with their neighbours and the GPU may lower its
clock to stay within its power. So each choice for decode is the start of a search in whole steps of the model, with
random weights: one product after another tries its fastest kernels there. For the rows of prefill only the gate's
product is measured, by itself. The plan is written after each model, and an earlier one keeps the entries that are not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
import triton
from decode_trials import DecodeTrials
from linear_candidates import (
    SEARCH_ORDER,
    SHAPES,
    Problem,
    Timing,
    candidates,
    choose,
    earlier_choices,
    is_worthwhile,
    plan_name,
    search,
    variations,
)
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mini_infer.kernels import linear_hopper
from mini_infer.kernels.activation import silu_and_mul
from mini_infer.kernels.linear_plan import DECODE_BUCKETS, M_BUCKETS, PLANS, LinearPlan, Tile
from mini_infer.kernels.norm import rmsnorm
from mini_infer.kernels.skinny_linear import launch_add_linear, launch_skinny_linear

COLD_BYTES = 512 << 20  # eight times the 60 MB L2 of an H200: what an unusual replacement keeps is little too
REPLAYS = 9
MODELS = {"8b": "llama-3.1-8b", "0.6b": "qwen3-0.6b"}  # whose steps the shapes are of
EPS = 1e-6
TOLERANCE = 1e-2


Job = TypeVar("Job")


@dataclass(frozen=True)
class Gpu:
    """What the compiler and the plan need to know of the GPU."""

    name: str
    arch: int  # compute capability, such as 90
    multiprocessors: int


def find_gpu() -> Gpu:
    """The GPU, as another process sees it: this one is to fork others, which may not have touched CUDA.

    Raises:
        SystemExit: there is no GPU.
    """
    code = "import torch; gpu = torch.cuda.get_device_properties(0)\n"
    code += "print(gpu.name, gpu.major, gpu.minor, gpu.multi_processor_count, sep=';')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"there is no GPU to measure on: {done.stderr.strip().splitlines()[-1]}")
    name, major, minor, multiprocessors = done.stdout.strip().split(";")
    return Gpu(name, 10 * int(major) + int(minor), int(multiprocessors))


def compile_all(jobs: list[tuple[Problem, Tile]], gpu: Gpu) -> None:
    """Compile every kernel that the candidates need, once."""
    unique: dict[tuple[object, ...], tuple[Problem, Tile]] = {}
    for problem, tile in jobs:
        if tile.is_library:
            continue
        m_pad = {"gemv": 1 << (problem.m - 1).bit_length(), "dot": max(16, problem.m)}.get(tile.kind, 0)
        if problem.m not in DECODE_BUCKETS:
            m_pad = problem.m  # a program may stay for several tiles
        even = (tile.block_k >= problem.k, problem.k % tile.block_k == 0)
        unique.setdefault((tile, m_pad, problem.role, even), (problem, tile))
    compile_on_all_cores(list(unique.values()), compile_one, gpu)


def compile_on_all_cores(jobs: Sequence[Job], compile_job: Callable[[Job], str], gpu: Gpu) -> None:
    """Compile candidates into Triton's cache, and print those that fail.

    Args:
        jobs: The candidates.
        compile_job: Launches one, in a process that compiles only. Returns what went wrong, or nothing.
        gpu: What to compile for. This process has not touched CUDA yet: it is forked.
    """
    begun = time.perf_counter()
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with context.Pool(cores, initializer=compile_only, initargs=(gpu,)) as pool:
        failures = [text for text in pool.imap_unordered(compile_job, jobs) if text]
    print(f"compiled {len(jobs)} candidates on {cores} cores in {time.perf_counter() - begun:.1f} s")
    for text in failures:
        print(f"  not compiled: {text}")


class CompileDriver:
    """Names the target to Triton where there is nothing to launch on."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Any device."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Any stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


def compile_only(gpu: Gpu) -> None:
    """Make launches of this process compile for a GPU and nothing else."""
    triton.runtime.driver.set_active(CompileDriver(gpu.arch))
    vars(linear_hopper)["multiprocessors"] = lambda device: gpu.multiprocessors
    run = JITFunction.run

    def compile_kernel(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_kernel


def compile_one(job: tuple[Problem, Tile]) -> str:
    """Compile one candidate. Returns what went wrong, or nothing."""
    problem, tile = job
    x = torch.empty(problem.m, problem.k, dtype=torch.bfloat16)
    weight = torch.empty(problem.n, problem.k, dtype=torch.bfloat16)  # never touched, so never backed by memory
    try:
        run_tile(problem, x, squares_of(x), torch.empty(problem.m, problem.n, dtype=x.dtype), weight, tile)
    except Exception as error:  # the compiler raises many kinds
        return f"{problem.name} m={problem.m} {tile}: {first_line(error)}"
    return ""


def run_tile(problem: Problem, x: Tensor, squares: Tensor, residual: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """The product as one of our kernels does it."""
    if problem.role == "add":
        launch_add_linear(residual, x, weight, None, tile)
        return residual
    if problem.normed and not tile.norms and x.is_cuda:  # where there is no GPU, to compile, the norm is no candidate's
        x = rmsnorm(x, None, EPS)
    return launch_skinny_linear(x, weight, None, tile, gated=problem.gated, eps=EPS, squares=squares)


def run_library(problem: Problem, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """The product as cuBLAS does it, with our kernels beside it."""
    if problem.role == "add":
        return residual.addmm_(x, weight.t())
    product = F.linear(rmsnorm(x, None, EPS) if problem.normed else x, weight)
    return silu_and_mul(product) if problem.gated else product


def squares_of(x: Tensor) -> Tensor:
    """Sums of the squares of the rows of x, in parts of 64 columns."""
    return x.float().square().view(len(x), -1, 64).sum(-1).t().contiguous()


def first_line(error: Exception) -> str:
    """Short form of an error."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:160]


def measure(call: Callable[[int], Tensor], copies: int, weight_bytes: int, stream: torch.cuda.Stream) -> float:
    """Microseconds of one call; `call` takes the number of the weight copy."""
    least = 12 if weight_bytes < 400 << 20 else 4
    calls = copies * -(-least // copies)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)  # whatever is set up on a first call, or fails on it
        torch.cuda.synchronize()
        # Not `torch.cuda.graph`, which collects garbage and empties the cache every time.
        graph.capture_begin(capture_error_mode="thread_local")
        for index in range(calls):
            call(index % copies)
        graph.capture_end()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return float(statistics.median(times)) * 1e3 / calls


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Error in the 2-norm."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def tune(problem: Problem, weights: Tensor, tiles: Iterable[Tile], stream: torch.cuda.Stream) -> list[Timing]:
    """Time cuBLAS and the candidates."""
    m = problem.m
    copies, weight_bytes = weights.shape[0], weights[0].numel() * weights.element_size()
    x = torch.randn(m, problem.k, device="cuda", dtype=weights.dtype)
    squares = squares_of(x)
    residual = torch.zeros(m, problem.n, device="cuda", dtype=weights.dtype)
    expected = run_library(problem, x, residual, weights[0]).clone()
    library_us = measure(lambda i: run_library(problem, x, residual, weights[i]), copies, weight_bytes, stream)
    timings: list[Timing] = [(library_us, None)]
    for tile in tiles:

        def run(i: int, tile: Tile = tile) -> Tensor:
            return run_tile(problem, x, squares, residual, weights[i], tile)

        try:
            residual.zero_()
            error = relative_error(run(0), expected)
            if not error < TOLERANCE:
                print(f"  WRONG: {problem.name} m={m} {tile}: relative error {error:.3g}")
                continue
            timings.append((measure(run, copies, weight_bytes, stream), tile))
        except Exception as failure:  # a tile that does not fit the GPU, in one of many ways
            print(f"  failed: {problem.name} m={m} {tile}: {first_line(failure)}")
    return timings


def search_model(
    model: str, timings: dict[Problem, list[Timing]], chosen: dict[Problem, Tile | None]
) -> dict[Problem, Tile | None]:
    """Better choices, if there are any, by the time of whole decode steps; all products of a model are there."""
    torch.cuda.empty_cache()
    by_rows: dict[int, dict[str, Problem]] = {}
    for problem in timings:
        by_rows.setdefault(problem.m, {})[problem.name.split()[1]] = problem
    starts = {m: {name: chosen[problem] for name, problem in problems.items()} for m, problems in by_rows.items()}
    alone = {m: {name: timings[problem] for name, problem in problems.items()} for m, problems in by_rows.items()}
    trials = DecodeTrials(model, max(by_rows))
    trials.compile(
        [(m, choice) for m in by_rows for name in SEARCH_ORDER for choice in variations(starts[m], alone[m], name)]
    )
    print(f"\nsteps of {model}, ms")
    found = {}
    for m, problems in by_rows.items():
        best, taken = search(partial(trials.measure, m), starts[m], alone[m])
        print(f"{m:>4} rows{'' if taken else ': no better choice'}")
        previous = starts[m]
        for before, after, choice in taken:
            changed = [f"{name} {tile or 'cuBLAS'}" for name, tile in choice.items() if tile != previous[name]]
            print(f"{before:>14.3f} -> {after:.3f}: {', '.join(changed)}", flush=True)
            previous = choice
        found.update({problem: best[name] for name, problem in problems.items()})
    return found


def describe(problem: Problem, timings: list[Timing]) -> str:
    """A line of the table: the best by itself."""
    (library_us, _), *_ = timings
    best_us, tile = min(timings, key=lambda timing: timing[0])
    return (
        f"{problem.name:<14}{problem.n:>7}{problem.k:>6}{problem.m:>4}  {tile or 'cuBLAS'!s:<32}{best_us:>8.2f}"
        f"{2e-6 * problem.n * problem.k / best_us:>7.2f}{library_us:>9.2f}{best_us / library_us:>7.2f}"
    )


def main() -> None:
    """Compile, measure, print, write."""
    arguments = parse()
    products = [
        Problem(f"{model} {name}", n, k, role, m)
        for model in arguments.models
        for name, (n, k, role) in SHAPES[model].items()
        if not arguments.shapes or name in arguments.shapes
        for m in arguments.m
    ]
    problems = [problem for problem in products if is_worthwhile(problem)]
    begun = time.perf_counter()
    jobs = [(problem, tile) for problem in problems for tile in candidates(problem, arguments.quick)]
    gpu = find_gpu()
    out = arguments.out or PLANS / plan_name(gpu.name)
    measured = earlier_choices(out, gpu.name)
    compile_all(jobs, gpu)

    print(f"{gpu.name}, torch {torch.__version__}, triton {triton.__version__}, bfloat16, cold weights\n")
    print(f"{'shape':<14}{'n':>7}{'k':>6}{'m':>4}  {'best':<32}{'us':>8}{'TB/s':>7}{'cuBLAS':>9}{'ratio':>7}")
    out.parent.mkdir(parents=True, exist_ok=True)
    weights = torch.empty(0)
    shape = (0, 0)
    stream = torch.cuda.Stream()
    torch.manual_seed(0)
    for model, group in itertools.groupby(problems, key=lambda problem: problem.name.split()[0]):
        timings: dict[Problem, list[Timing]] = {}
        for problem in group:
            if shape != (problem.n, problem.k):
                shape = problem.n, problem.k
                del weights
                copies = max(1, -(-COLD_BYTES // (2 * problem.n * problem.k)))
                weights = torch.empty(copies, *shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)
            timings[problem] = tune(problem, weights, candidates(problem, arguments.quick), stream)
            if arguments.all:
                for us, tile in sorted(timings[problem], key=lambda timing: timing[0]):
                    print(f"    {problem.name:<14}{problem.m:>3}  {tile or 'cuBLAS'!s:<32}{us:>9.2f} us")
            print(describe(problem, timings[problem]), flush=True)
        chosen = choose(timings)
        if not arguments.alone:
            weights, shape = torch.empty(0), (0, 0)
            decode = {problem: times for problem, times in timings.items() if problem.m in DECODE_BUCKETS}
            chosen |= search_model(MODELS[model], decode, chosen) if decode else {}
        print(f"\nchosen for {model}")
        for problem, tile in chosen.items():
            measured.setdefault((problem.n, problem.k, problem.role), {})[problem.m] = tile
            print(f"{problem.name:<14}{problem.m:>4}  {tile or 'cuBLAS'}")
        out.write_text(LinearPlan(gpu.name, "bfloat16", measured).to_json(), encoding="utf-8")
    print(f"\n{out}: {len(problems)} products, {len(jobs)} tiles in {time.perf_counter() - begun:.0f} s")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the plan goes (default: the shipped plans, by the GPU's name)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="whose shapes")
    parser.add_argument("--shapes", nargs="+", help="only these, such as qkv or gate_up")
    parser.add_argument("--m", nargs="+", type=int, choices=M_BUCKETS, default=list(M_BUCKETS), help="row counts")
    parser.add_argument("--quick", action="store_true", help="four candidates for each product")
    parser.add_argument("--alone", action="store_true", help="choose without whole steps; implied by --shapes")
    parser.add_argument("--all", action="store_true", help="print every candidate's time")
    arguments = parser.parse_args()
    arguments.alone |= bool(arguments.shapes)
    return arguments


if __name__ == "__main__":
    main()
