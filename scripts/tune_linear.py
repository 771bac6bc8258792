"""Measure which kernel and tile each skinny matrix product of a decoder should use on this GPU, and write the plan.

    python scripts/tune_linear.py --out kernels/plans/h200-bf16.json
    python scripts/tune_linear.py --quick --models 8b --m 1 16

Every candidate runs as in a decode step: with the norm, the gate or the residual of its role, captured in a CUDA graph,
its weights out of the cache (the calls rotate among copies that exceed the L2 cache several times). It must agree with
cuBLAS and the kernels beside it before it is timed. The kernels are compiled first, in one process per core, into
Triton's cache. Two products of which one may leave the squares that the other norms with are chosen together. The plan
is written after each model, and an earlier one keeps the entries that are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mini_infer.kernels.activation import silu_and_mul
from mini_infer.kernels.linear_plan import (
    M_BUCKETS,
    MAX_DOT_ROWS,
    MAX_GEMV_ROWS,
    MAX_NORMED_ROWS,
    PLANS,
    LinearPlan,
    Role,
    Tile,
    square_parts,
)
from mini_infer.kernels.norm import rmsnorm
from mini_infer.kernels.skinny_linear import launch_add_linear, launch_skinny_linear

SHAPES: dict[str, dict[str, tuple[int, int, Role]]] = {
    "8b": {
        "qkv": (6144, 4096, "norm"),
        "o": (4096, 4096, "add"),
        "gate_up": (28672, 4096, "norm_gate"),
        "down": (4096, 14336, "add"),
        "head": (128256, 4096, "plain"),
    },
    "0.6b": {
        "qkv": (4096, 1024, "norm"),
        "o": (1024, 2048, "add"),
        "gate_up": (6144, 1024, "norm_gate"),
        "down": (1024, 3072, "add"),
        "head": (151936, 1024, "plain"),
    },
}
COLD_BYTES = 512 << 20  # eight times the 60 MB L2 of an H200: what an unusual replacement keeps is little too
REPLAYS = 9
EPS = 1e-6
TOLERANCE = 1e-2
WORTHWHILE = 0.98  # a tile is chosen over cuBLAS if it takes less than this part of its time
PAIRS = {"gate_up": "o", "qkv": "down"}  # whose rows a product norms
NORM_US = 2.0  # about what a kernel that norms adds, where a tile lacks the squares to do without


@dataclass(frozen=True)
class Problem:
    """One product to tune."""

    name: str
    n: int
    k: int
    role: Role
    m: int

    @property
    def gated(self) -> bool:
        """Whether silu(gate) * up is taken of the result."""
        return self.role == "norm_gate"

    @property
    def normed(self) -> bool:
        """Whether x is normed first."""
        return self.role in ("norm", "norm_gate")


def gemv_tiles(problem: Problem) -> list[Tile]:
    """Candidates for a few rows, by the number of columns."""
    block_k = 1 << (problem.k - 1).bit_length()
    if block_k <= 2048:
        sizes = [(1, block_k, 4, 1), (2, block_k, 4, 1), (4, block_k, 4, 1), (4, block_k, 8, 1), (8, block_k, 8, 1)]
    elif block_k <= 4096:
        sizes = [(1, block_k, 8, 1), (1, block_k, 4, 1), (2, block_k, 8, 1), (2, 1024, 4, 3), (4, 1024, 4, 4)]
        sizes.append((1, 1024, 4, 3) if problem.k % block_k else (4, 2048, 8, 2))
    else:
        sizes = [(1, block_k, 8, 1), (1, block_k, 16, 1), (1, 2048, 8, 4), (2, 2048, 8, 3), (4, 1024, 4, 4)]
    least = 2 if problem.gated else 1
    return [Tile("gemv", n, k, warps, stages) for n, k, warps, stages in sizes if n >= least]


def dot_tiles(problem: Problem) -> list[Tile]:
    """Candidates on tensor cores, by the padded number of rows: (block_n, block_k, warps, stages, split_k)."""
    few = problem.n <= 6144  # too few programs to fill the GPU: narrower tiles, and columns that are shared
    if problem.m <= MAX_GEMV_ROWS:
        sizes = [(32, 256, 2, 4, 1), (16, 512, 2, 3, 1), (32, 512, 2, 3, 1)]
        sizes += [(16, 256, 2, 4, 2)] if few else [(32, 128, 2, 5, 1)]
    elif problem.m <= 16:
        sizes = [(32, 256, 2, 4, 1), (32, 128, 2, 5, 1), (32, 512, 2, 3, 1), (16, 256, 2, 4, 1), (16, 512, 2, 3, 1)]
        sizes += [(64, 128, 4, 4, 1), (32, 256, 4, 4, 1)]
        sizes += [(16, 256, 2, 4, 2), (32, 256, 2, 4, 2), (32, 256, 2, 3, 4)] if few else [(64, 256, 4, 3, 1)]
    elif problem.m <= 32:
        sizes = [(32, 128, 2, 5, 1), (32, 256, 2, 3, 1), (32, 256, 4, 3, 1), (64, 128, 4, 4, 1), (64, 256, 4, 3, 1)]
        sizes += [(16, 256, 2, 3, 1), (32, 128, 4, 5, 1)]
        sizes += [(32, 128, 2, 4, 2), (32, 256, 4, 3, 2), (64, 128, 4, 3, 4)] if few else [(128, 64, 4, 5, 1)]
    else:
        sizes = [(32, 128, 4, 5, 1), (32, 256, 4, 3, 1), (64, 128, 4, 4, 1), (64, 64, 4, 6, 1), (128, 64, 4, 5, 1)]
        sizes += [(64, 128, 8, 4, 1)]
        sizes += [(64, 128, 4, 4, 2), (64, 128, 4, 3, 4), (128, 64, 4, 4, 4)] if few else [(128, 128, 8, 3, 1)]
    tiles = [Tile("dot", *size) for size in sizes]
    whole = -(-problem.k // 1024)  # with so many programs to share them, all columns of a program at once
    if few and whole <= 4:
        tiles += [Tile("dot", block_n, 1024, warps, 1, whole) for block_n in (16, 32) for warps in (2, 4)]
    return tiles


def tma_tiles(problem: Problem) -> list[Tile]:
    """Candidates from shared memory: (block_m, block_n, block_k, warps, stages, split_k)."""
    few = problem.n <= 6144  # too few programs to fill the GPU: columns that are shared
    if problem.m <= 32:
        rows = 16 if problem.m <= 16 else 32
        sizes = [
            (rows, 128, 128, 4, 4, 1),
            (rows, 128, 128, 4, 3, 1),
            (rows, 128, 256, 4, 3, 1),
            (rows, 128, 64, 4, 8, 1),
        ]
        sizes += [(rows, 64, 128, 4, 6, 1), (rows, 64, 256, 4, 4, 1), (rows, 64, 256, 4, 2, 1)]
        if few:
            sizes += [
                (rows, 64, 256, 4, 4, 2),
                (rows, 64, 128, 4, 4, 2),
                (rows, 64, 256, 4, 2, 4),
                (rows, 128, 128, 4, 4, 4),
            ]
    elif problem.m <= 64:
        sizes = [(64, 128, 128, 4, 4, 1), (64, 128, 64, 4, 4, 1), (64, 128, 64, 4, 7, 1), (64, 128, 128, 8, 4, 1)]
        sizes += [(64, 256, 64, 8, 4, 1), (64, 64, 128, 4, 3, 1), (64, 64, 128, 4, 6, 1), (64, 64, 64, 4, 6, 1)]
        sizes += [(64, 64, 256, 4, 3, 1)]
        if few:
            sizes += [(64, 64, 128, 4, 3, 2), (64, 64, 128, 4, 6, 2), (64, 128, 64, 4, 6, 4), (64, 128, 128, 4, 4, 4)]
            sizes += [(32, 64, 128, 4, 4, 1), (64, 128, 64, 4, 4, 2)]
    else:
        sizes = [(128, 128, 64, 8, 4, 1), (128, 128, 64, 4, 3, 1), (128, 256, 64, 8, 4, 1), (128, 128, 64, 8, 6, 1)]
        sizes += [(256, 128, 64, 8, 4, 1), (128, 128, 128, 8, 3, 1), (128, 256, 128, 8, 2, 1), (256, 128, 128, 8, 2, 1)]
        sizes += [(128, 128, 128, 4, 3, 1), (256, 64, 64, 4, 4, 1), (256, 64, 128, 4, 2, 1), (64, 128, 128, 4, 4, 1)]
        if problem.m % 128:
            sizes += [(64, 128, 64, 4, 4, 1), (64, 256, 64, 8, 4, 1)]
        if few:
            sizes += [(128, 64, 64, 4, 4, 1), (128, 64, 128, 4, 4, 1), (64, 64, 128, 4, 6, 1), (64, 128, 64, 4, 6, 1)]
            sizes += [(128, 64, 128, 4, 4, 2), (64, 64, 128, 4, 6, 2), (64, 64, 256, 4, 3, 1), (128, 64, 256, 4, 2, 1)]
            sizes += [(128, 128, 64, 8, 4, 2), (128, 64, 64, 4, 6, 2), (128, 128, 64, 8, 4, 4), (256, 128, 64, 8, 4, 4)]
    least = 128 if problem.gated else 64
    most = 1 << (problem.m - 1).bit_length()
    return [
        Tile("tma", n, k, warps, stages, split_k, block_m=m)
        for m, n, k, warps, stages, split_k in sizes
        if n >= least and m <= max(16, most)
    ]


def candidates(problem: Problem, quick: bool) -> list[Tile]:
    """What is worth measuring for this product."""
    gemv = gemv_tiles(problem) if problem.m <= MAX_GEMV_ROWS else []
    dot = dot_tiles(problem) if problem.m <= MAX_DOT_ROWS else []
    tma = tma_tiles(problem) if problem.m > 2 else []
    tiles = gemv[:2] + dot[:2] + tma[:2] if quick else gemv + dot + tma
    if problem.normed:
        can_norm = [
            tile for tile in tiles if tile.split_k == 1 and (tile.kind != "dot" or problem.m <= MAX_NORMED_ROWS)
        ]
        tiles += [replace(tile, norms=True) for tile in can_norm]
    if problem.gated:
        tiles.append(Tile("whole", norms=True))
        if problem.m > MAX_DOT_ROWS:
            tiles += [Tile("halves"), Tile("halves", norms=True)]
    return tiles


def compile_all(jobs: list[tuple[Problem, Tile]], arch: int) -> None:
    """Compile every candidate into Triton's cache, before this process touches the GPU: the workers are forked."""
    unique: dict[tuple[object, ...], tuple[Problem, Tile]] = {}
    for problem, tile in jobs:
        if tile.is_library:
            continue
        m_pad = {"gemv": 1 << (problem.m - 1).bit_length(), "dot": max(16, problem.m)}.get(tile.kind, 0)
        even = (tile.block_k >= problem.k, problem.k % tile.block_k == 0)
        unique.setdefault((tile, m_pad, problem.role, even), (problem, tile))
    begun = time.perf_counter()
    cores = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with context.Pool(cores, initializer=compile_only, initargs=(arch,)) as pool:
        failures = [text for text in pool.imap_unordered(compile_one, unique.values()) if text]
    print(f"compiled {len(unique)} kernels on {cores} cores in {time.perf_counter() - begun:.1f} s")
    for text in failures:
        print(f"  not compiled: {text}")


def architecture() -> int:
    """The GPU's compute capability, such as 90, without touching CUDA."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return int(answer.strip().replace(".", ""))


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


def compile_only(arch: int) -> None:
    """Make launches of this process compile and nothing else."""
    triton.runtime.driver.set_active(CompileDriver(arch))
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


Timing: TypeAlias = tuple[float, Tile | None]
"""Microseconds, and the tile that took them; None for cuBLAS."""


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


def describe(problem: Problem, timings: list[Timing]) -> str:
    """A line of the table: the best by itself."""
    (library_us, _), *_ = timings
    best_us, tile = min(timings, key=lambda timing: timing[0])
    return (
        f"{problem.name:<14}{problem.n:>7}{problem.k:>6}{problem.m:>4}  {tile or 'cuBLAS'!s:<32}{best_us:>8.2f}"
        f"{2e-6 * problem.n * problem.k / best_us:>7.2f}{library_us:>9.2f}{best_us / library_us:>7.2f}"
    )


def cost(timing: Timing) -> float:
    """Microseconds as they are compared: a tile must be worth it."""
    us, tile = timing
    return us if tile is None else us / WORTHWHILE


def choose(timings: dict[Problem, list[Timing]]) -> dict[Problem, Tile | None]:
    """The tiles to use, a product that norms together with the one whose sums it norms."""
    by_name = {(problem.name, problem.m): problem for problem in timings}
    chosen = {problem: min(each, key=cost)[1] for problem, each in timings.items()}
    for (name, m), normed in by_name.items():
        model, _, shape = name.partition(" ")
        added = by_name.get((f"{model} {PAIRS.get(shape)}", m))
        if added is not None:
            pairs = itertools.product(timings[added], timings[normed])
            (_, chosen[added]), (_, chosen[normed]) = min(pairs, key=lambda pair: pair_cost(added.n, *pair))
    return chosen


def pair_cost(n: int, added: Timing, normed: Timing) -> float:
    """Microseconds of a product of n columns and of the one that norms them."""
    needs = normed[1] is not None and normed[1].needs_squares
    lacks = added[1] is None or not square_parts(added[1], n)
    return cost(added) + cost(normed) + (NORM_US if needs and lacks else 0.0)


def main() -> None:
    """Compile, measure, print, write."""
    arguments = parse()
    problems = [
        Problem(f"{model} {name}", n, k, role, m)
        for model in arguments.models
        for name, (n, k, role) in SHAPES[model].items()
        if not arguments.shapes or name in arguments.shapes
        for m in arguments.m
    ]
    begun = time.perf_counter()
    jobs = [(problem, tile) for problem in problems for tile in candidates(problem, arguments.quick)]
    compile_all(jobs, architecture())

    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, bfloat16, cold weights\n")
    print(f"{'shape':<14}{'n':>7}{'k':>6}{'m':>4}  {'best':<32}{'us':>8}{'TB/s':>7}{'cuBLAS':>9}{'ratio':>7}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    kept = LinearPlan.from_json(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else None
    measured = {key: dict(tiles) for key, tiles in kept.measured.items()} if kept and kept.gpu == gpu else {}
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
        print(f"\nchosen for {model}")
        for problem, tile in choose(timings).items():
            measured.setdefault((problem.n, problem.k, problem.role), {})[problem.m] = tile
            print(f"{problem.name:<14}{problem.m:>4}  {tile or 'cuBLAS'}")
        arguments.out.write_text(LinearPlan(gpu, "bfloat16", measured).to_json(), encoding="utf-8")
    print(f"\n{arguments.out}: {len(problems)} products, {len(jobs)} tiles in {time.perf_counter() - begun:.0f} s")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PLANS / "h200-bf16.json", help="where the plan goes")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="whose shapes")
    parser.add_argument("--shapes", nargs="+", help="only these, such as qkv or gate_up")
    parser.add_argument("--m", nargs="+", type=int, choices=M_BUCKETS, default=list(M_BUCKETS), help="row counts")
    parser.add_argument("--quick", action="store_true", help="four candidates for each product")
    parser.add_argument("--all", action="store_true", help="print every candidate's time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
