"""What `tune_linear.py` measures for each matrix product, how it chooses by that, and which plan it adds to. No GPU is
needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from mini_infer.kernels.linear_plan import (
    DECODE_BUCKETS,
    MAX_DOT_ROWS,
    MAX_GEMV_ROWS,
    MAX_NORMED_ROWS,
    LinearPlan,
    Role,
    ShapeKey,
    Tile,
    square_parts,
)

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
WORTHWHILE = 0.98  # a tile is chosen over cuBLAS if it takes less than this part of its time
PAIRS = {"gate_up": "o", "qkv": "down"}  # whose rows a product norms
SEARCH_ORDER = ("gate_up", "o", "qkv", "down", "head")
CONTENDERS = 4  # of a product, the fastest by themselves, are tried in whole steps
GAIN = 0.997  # another choice is taken if the step takes less than this part of its time
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


def hopper_tiles(problem: Problem) -> list[Tile]:
    """Candidates from shared memory with a warp that loads: (block_m, block_n, block_k, warps, stages, split_k).

    Those that need less than half of a multiprocessor's shared memory have it with another program, or the one before.
    """
    if problem.m <= 32:
        rows = 16 if problem.m <= 16 else 32
        sizes = [(rows, 64, 128, 4, 8, 1), (rows, 64, 128, 4, 4, 1), (rows, 64, 256, 4, 4, 1), (rows, 64, 256, 4, 2, 1)]
        if problem.gated:
            sizes += [(rows, 128, 64, 4, 10, 1), (rows, 128, 128, 4, 5, 1), (rows, 128, 128, 4, 2, 1)]
        if problem.role == "add":  # too few programs to fill the GPU: columns that are shared
            sizes += [(rows, 64, 128, 4, 8, 2), (rows, 64, 256, 4, 4, 2), (rows, 64, 256, 4, 2, 4)]
    elif problem.m <= 64:
        sizes = [(64, 64, 128, 4, 6, 1), (64, 64, 64, 4, 12, 1), (64, 64, 128, 4, 3, 1), (64, 64, 64, 4, 6, 1)]
        if problem.gated:
            sizes += [(64, 128, 128, 4, 4, 1), (64, 128, 128, 4, 2, 1), (64, 128, 64, 4, 8, 1), (64, 256, 64, 8, 4, 1)]
        if problem.role == "add":
            sizes += [(64, 64, 128, 4, 6, 2), (64, 64, 64, 4, 12, 2), (64, 64, 128, 4, 3, 4), (64, 128, 64, 8, 8, 4)]
    else:
        sizes = [(128, 64, 64, 4, 8, 1), (128, 64, 128, 4, 4, 1), (64, 64, 128, 4, 6, 1), (64, 64, 64, 4, 12, 1)]
        sizes += [(128, 128, 64, 8, 5, 1), (256, 128, 64, 8, 3, 1)]
        if problem.gated:
            sizes += [(128, 128, 64, 4, 6, 1), (128, 128, 64, 4, 2, 1), (64, 128, 64, 4, 8, 1), (128, 256, 64, 8, 3, 1)]
        if problem.role == "add":
            sizes += [(128, 64, 64, 4, 8, 2), (128, 64, 128, 4, 4, 2), (64, 64, 128, 4, 6, 2), (128, 128, 64, 8, 6, 4)]
            sizes += [(128, 128, 64, 8, 6, 2), (256, 128, 64, 8, 4, 4), (256, 128, 64, 8, 4, 2)]
    most = 1 << (problem.m - 1).bit_length()
    return [
        Tile("hopper", n, k, warps, stages, split_k, block_m=m)
        for m, n, k, warps, stages, split_k in sizes
        if m <= max(16, most)
    ]


def prefill_tiles() -> list[Tile]:
    """Candidates for the gate of many rows, after a kernel that norms: (block_m, block_n, block_k, warps, stages)."""
    sizes = [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 5)]
    return [Tile("hopper", n, k, warps, stages, block_m=m) for m, n, k, warps, stages in sizes]


def is_worthwhile(problem: Problem) -> bool:
    """Whether there is anything to choose: of many rows only the gate is not best left to cuBLAS."""
    return problem.m in DECODE_BUCKETS or problem.gated


def candidates(problem: Problem, quick: bool) -> list[Tile]:
    """What is worth measuring for this product."""
    if problem.m not in DECODE_BUCKETS:
        return prefill_tiles()
    gemv = gemv_tiles(problem) if problem.m <= MAX_GEMV_ROWS else []
    dot = dot_tiles(problem) if problem.m <= MAX_DOT_ROWS else []
    tma, hopper = tma_tiles(problem), hopper_tiles(problem)
    tiles = gemv[:2] + dot[:2] + tma[:2] + hopper[:2] if quick else gemv + dot + tma + hopper
    if problem.normed:
        can_norm = [
            tile for tile in tiles if tile.split_k == 1 and (tile.kind != "dot" or problem.m <= MAX_NORMED_ROWS)
        ]
        tiles += [replace(tile, norms=True) for tile in can_norm]
    if problem.role == "add":
        return [leaving(tile) for tile in tiles]
    if problem.gated:
        tiles.append(Tile("whole", norms=True))
        if problem.m > MAX_DOT_ROWS:
            tiles += [Tile("halves"), Tile("halves", norms=True)]
    return tiles


def plan_name(gpu: str) -> str:
    """File name of a GPU's plan."""
    return "-".join([*gpu.lower().removeprefix("nvidia ").split(), "bf16.json"])


def earlier_choices(path: Path, gpu: str) -> dict[ShapeKey, dict[int, Tile | None]]:
    """What a plan that is there already says.

    Raises:
        SystemExit: it is another GPU's.
    """
    if not path.is_file():
        return {}
    plan = LinearPlan.from_json(path.read_text(encoding="utf-8"))
    if plan.gpu != gpu:
        raise SystemExit(f"{path} is the plan of {plan.gpu}, and this is {gpu}: name another file with --out")
    return {key: dict(tiles) for key, tiles in plan.measured.items()}


Timing: TypeAlias = tuple[float, Tile | None]
"""Microseconds, and the tile that took them; None for cuBLAS."""

Choice: TypeAlias = dict[str, Tile | None]
"""The kernel of each product of a model, at one row count."""


def leaving(tile: Tile) -> Tile:
    """The tile as it is measured where it adds: with squares left, where it can leave them."""
    return replace(tile, leaves=tile.can_leave)


def cost(timing: Timing) -> float:
    """Microseconds as they are compared: a tile must be worth it."""
    us, tile = timing
    return us if tile is None else us / WORTHWHILE


def choose(timings: dict[Problem, list[Timing]]) -> dict[Problem, Tile | None]:
    """The tiles to use, a product that norms together with the one whose sums it norms."""
    by_name = {(problem.name, problem.m): problem for problem in timings}
    alone: Timing = 0.0, None  # what makes the rows of a product whose partner was not measured: it leaves no squares
    chosen = {p: min(each, key=lambda timing: pair_cost(0, alone, timing))[1] for p, each in timings.items()}
    for (name, m), normed in by_name.items():
        model, _, shape = name.partition(" ")
        added = by_name.get((f"{model} {PAIRS.get(shape)}", m))
        if added is not None:
            pairs = itertools.product(timings[added], timings[normed])
            (_, adds), (_, norms) = min(pairs, key=lambda pair: pair_cost(added.n, *pair))
            wanted = norms is not None and norms.needs_squares
            chosen[added] = adds if adds is None else replace(adds, leaves=adds.leaves and wanted)
            chosen[normed] = norms
    return chosen


def pair_cost(n: int, added: Timing, normed: Timing) -> float:
    """Microseconds of a product of n columns and of the one that norms them."""
    needs = normed[1] is not None and normed[1].needs_squares
    lacks = added[1] is None or not square_parts(added[1], n)
    return cost(added) + cost(normed) + (NORM_US if needs and lacks else 0.0)


def variations(chosen: Choice, timings: Mapping[str, Sequence[Timing]], name: str) -> list[Choice]:
    """Choices for one model and row count that differ from the chosen one in the kernel of one product, and of the one
    whose rows it norms as far as squares are left or not.

    Args:
        chosen: The kernel of each product.
        timings: Of each product by itself.
        name: Which one to vary: its fastest kernels, and cuBLAS.
    """
    readers = {added: normed for normed, added in PAIRS.items()}
    fastest = [tile for _, tile in sorted(timings[name], key=cost)[:CONTENDERS]]
    varied: list[Choice] = []
    for tile in dict.fromkeys([*fastest, None]):
        choice = {**chosen, name: tile}
        if name in PAIRS:
            added = PAIRS[name]
            choice[added] = _adding(chosen[added], timings[added], tile is not None and tile.needs_squares)
        elif name in readers and tile is not None:
            reader = chosen[readers[name]]
            choice[name] = replace(tile, leaves=tile.leaves and reader is not None and reader.needs_squares)
        if choice != chosen and choice not in varied:
            varied.append(choice)
    return varied


def search(
    measure: Callable[[Sequence[Choice]], Sequence[float]], chosen: Choice, timings: Mapping[str, Sequence[Timing]]
) -> tuple[Choice, list[tuple[float, float, Choice]]]:
    """Look for a better choice, product by product: each takes its best variation in the step as it is by then.

    Args:
        measure: The milliseconds of a whole step with each of some choices.
        chosen: Where to begin.
        timings: Of each product by itself.

    Returns:
        The best choice; and for each that was taken the milliseconds of a step before, those with it, and the choice.
    """
    taken = []
    for name in SEARCH_ORDER:
        choices = [chosen, *variations(chosen, timings, name)]
        before, *times = measure(choices)
        best = min(times, default=before)
        if best < GAIN * before:
            chosen = choices[1 + times.index(best)]
            taken.append((before, best, chosen))
    return chosen, taken


def _adding(tile: Tile | None, timings: Sequence[Timing], leaves: bool) -> Tile | None:
    """The kernel of a product that adds, with squares left or not; if it cannot leave them, the fastest that can."""
    if not leaves:
        return tile if tile is None else replace(tile, leaves=False)
    if tile is None or not tile.can_leave:
        able = [timing for timing in timings if timing[1] is not None and timing[1].leaves]
        return min(able, key=cost)[1] if able else tile
    return replace(tile, leaves=True)
