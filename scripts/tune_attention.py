"""Measure how decode and prefill attention should be cut up on this GPU.

    python scripts/tune_attention.py
    python scripts/tune_attention.py --only decode --all

Every candidate runs as in a step: captured in a CUDA graph, its K/V out of the cache (the calls rotate among block
tables that together name more than the L2 cache holds), the tables shuffled over a large pool. It must agree with the
float32 reference before it is timed. The kernels are compiled first, in one process per core, into Triton's cache.

One configuration serves all batches of a model, so that a row's result does not depend on its neighbours: the ranking
over all shapes at the end is what `decode_config` and `prefill_config` should follow. Prefill attention is measured in
the portable kernel: the one for Hopper has a single configuration.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import triton
from torch import Tensor
from tune_linear import compile_on_all_cores, find_gpu, first_line, relative_error

from mini_infer.kernels.attention_decode import DecodeConfig, _launch_paged_attention, decode_config
from mini_infer.kernels.attention_decode_cpu import paged_attention_reference
from mini_infer.kernels.attention_prefill import PrefillConfig, _launch_paged_prefill_attention, prefill_config
from mini_infer.kernels.attention_prefill_cpu import paged_prefill_attention_reference

KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 128, 16
TOKEN_BYTES = KV_HEADS * HEAD_DIM * 2 * 2  # K and V of a token in 16 bits
MAX_BLOCKS = 256  # width of the block tables: sequences of 4096 tokens
POOL_BLOCKS = 80_000
COLD_BYTES = 160 << 20  # more than twice the 60 MB L2 of an H200
PEAK_TB = 4.58
REPLAYS = 7
TOLERANCE = 1e-2
HEADS = {"8b": 32, "0.6b": 16}

Config: TypeAlias = DecodeConfig | PrefillConfig


@dataclass(frozen=True)
class Shape:
    """One batch: sequences of these many tokens, all of them new if it is a prefill, else one."""

    name: str
    heads: int
    lens: tuple[int, ...]
    prefill: bool

    @property
    def work(self) -> float:
        """Bytes of K/V that decode reads, or operations of causal prefill."""
        if self.prefill:
            return sum(2 * 2 * HEAD_DIM * self.heads * length**2 / 2 for length in self.lens)
        return float(sum(self.lens) * TOKEN_BYTES)


def shapes(model: str, prefill: bool) -> list[Shape]:
    """The batches to measure."""
    if prefill:
        batches = {f"{n}x{length}": (length,) * n for n, length in ((4, 2048), (1, 8192), (16, 512), (1, 512))}
    else:
        counts = ((1, 192), (1, 1000), (1, 4000), (8, 192), (16, 192), (64, 192), (64, 1000), (256, 192), (256, 820))
        batches = {f"{rows}x{context}": (context,) * rows for rows, context in counts}
        for rows in (24, 48, 64, 96, 144, 208, 256):
            batches[f"{rows} ragged"] = ragged(rows)
    return [Shape(f"{model} {name}", HEADS[model], lens, prefill) for name, lens in batches.items()]


def ragged(rows: int) -> tuple[int, ...]:
    """Contexts while a batch drains: 256 requests of 100 to 1024 prompt and output tokens began together, and some of
    them are left, in a bucket of this many rows: one in eight is a padded one."""
    rng = random.Random(0)
    requests = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
    left = rows - rows // 8
    steps = sorted(outputs for _, outputs in requests)[256 - left] - 1
    contexts = [prompt + steps for prompt, outputs in requests if outputs > steps]
    return (*contexts[:left], *[0] * (rows - left))


def decode_candidates() -> list[DecodeConfig]:
    """(block_n, num_warps, num_stages, programs for each multiprocessor)."""
    sizes = [(64, 4, 3, 1), (64, 4, 3, 2), (64, 4, 3, 4), (64, 4, 3, 8), (64, 4, 2, 2), (64, 4, 2, 3), (64, 2, 3, 2)]
    sizes += [(64, 2, 2, 3), (64, 8, 3, 2), (128, 8, 2, 2), (128, 8, 3, 1), (32, 2, 3, 4), (32, 2, 4, 3), (32, 4, 3, 4)]
    return [DecodeConfig(*size) for size in sizes]


def prefill_candidates() -> list[PrefillConfig]:
    """(block_m, block_n, num_warps, num_stages, registers)."""
    wide = [(128, 32, 8, 2, None), (128, 32, 8, 2, 128), (128, 32, 8, 3, 128), (128, 64, 8, 2, None)]
    wide += [(128, 64, 8, 3, None), (128, 64, 8, 2, 128), (128, 128, 8, 2, None), (128, 128, 8, 3, None)]
    narrow = [(64, 32, 4, 2, None), (64, 32, 4, 3, None), (64, 64, 4, 2, None), (64, 64, 4, 3, None)]
    return [PrefillConfig(*sizes) for sizes in wide + narrow]


def label(config: Config) -> str:
    """Short form of a configuration."""
    if isinstance(config, DecodeConfig):
        return f"n{config.block_n} w{config.num_warps} s{config.num_stages} p{config.programs}"
    sizes = f"m{config.block_m} n{config.block_n} w{config.num_warps} s{config.num_stages}"
    return sizes if config.registers is None else f"{sizes} r{config.registers}"


class Batch:
    """The tensors of a shape, with one block table for each call that a graph holds."""

    def __init__(self, shape: Shape, pool: Tensor, device: str, copies: int) -> None:
        self.shape = shape
        self.key_cache, self.value_cache = pool[0], pool[1]
        rows, longest = len(shape.lens), -(-max(shape.lens) // BLOCK_SIZE)
        width = max(MAX_BLOCKS, longest)
        self.tables = torch.zeros(copies, rows, width, dtype=torch.int32, device=device)
        used = 0
        ids = torch.randperm(pool.shape[1] - 1, device=device) + 1 if device == "cuda" else None
        for copy in range(copies if ids is not None else 0):
            if used + rows * longest > pool.shape[1] - 1:
                used = 0
            self.tables[copy, :, :longest] = ids[used : used + rows * longest].view(rows, longest)  # type: ignore[index]
            used += rows * longest
        self.lens = torch.tensor(shape.lens, dtype=torch.int32, device=device)
        self.starts = torch.tensor([0, *shape.lens], device=device).cumsum(0).to(torch.int32)
        tokens = sum(shape.lens) if shape.prefill else rows
        self.query = torch.empty(tokens, shape.heads, HEAD_DIM, dtype=torch.bfloat16, device=device)
        if device == "cuda":
            self.query.normal_()

    def run(self, config: Config, copy: int = 0) -> Tensor:
        """One call."""
        args = self.query, self.key_cache, self.value_cache, self.tables[copy], self.lens
        scale = HEAD_DIM**-0.5
        if isinstance(config, PrefillConfig):
            return _launch_paged_prefill_attention(*args, self.starts, scale, 0, config=config)
        return _launch_paged_attention(*args, scale, 0, config=config)

    def expected(self) -> Tensor:
        """What call 0 should give."""
        args = self.query.float(), self.key_cache, self.value_cache, self.tables[0], self.lens
        if self.shape.prefill:
            return paged_prefill_attention_reference(*args, self.starts, HEAD_DIM**-0.5)
        return paged_attention_reference(*args, HEAD_DIM**-0.5)


def compile_one(job: tuple[Shape, Config]) -> str:
    """Compile one candidate. Returns what went wrong, or nothing."""
    shape, config = job
    try:  # the pool is never touched, so never backed by memory
        pool = torch.empty(2, POOL_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16)
        Batch(shape, pool, "cpu", 1).run(config)
    except Exception as error:  # the compiler raises many kinds
        return f"{shape.name} {label(config)}: {first_line(error)}"
    return ""


def cases(batches: Sequence[Shape], configs: Sequence[Config]) -> list[tuple[Shape, Config]]:
    """One case for each kernel that the measurements need: shapes that share their specialisation count once."""
    unique: dict[tuple[object, ...], tuple[Shape, Config]] = {}
    for shape in batches:
        for config in configs:
            key: tuple[object, ...] = config, shape.heads, len(shape.lens) == 1, len(shape.lens) % 16 == 0
            if isinstance(config, DecodeConfig):
                key = replace(config, programs=1), *key[1:]
            unique.setdefault(key, (shape, config))
    return list(unique.values())


def measure(call: Callable[[int], Tensor], copies: int) -> float:
    """Microseconds of one call; `call` takes the number of the block table."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    for event in events:
        event.record()
        if event is not events[-1]:
            graph.replay()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return float(statistics.median(times)) * 1e3 / copies


def sweep(batches: Sequence[Shape], configs: Sequence[Config], pool: Tensor, show_all: bool) -> dict[Config, float]:
    """Time every configuration on every shape and print the table.

    Returns:
        For each configuration that ran everywhere, its time over the best of each shape (geometric mean).
    """
    times: dict[Config, list[float]] = {config: [] for config in configs}
    for shape in batches:
        copies = 3 if shape.prefill else min(128, max(3, COLD_BYTES // int(shape.work)))
        batch = Batch(shape, pool, "cuda", copies)
        expected = batch.expected()
        for config in configs:

            def call(copy: int, batch: Batch = batch, config: Config = config) -> Tensor:
                return batch.run(config, copy)

            try:
                error = relative_error(batch.run(config), expected)
                if not error < TOLERANCE:
                    print(f"  WRONG: {shape.name} {label(config)}: relative error {error:.3g}")
                else:
                    times[config].append(measure(call, copies))
                    continue
            except Exception as failure:  # a tile that does not fit the GPU, in one of many ways
                print(f"  failed: {shape.name} {label(config)}: {first_line(failure)}")
            times[config].append(math.inf)
        ranked = sorted(configs, key=lambda config: times[config][-1])
        for place, config in enumerate(ranked if show_all else ranked[:3]):
            us = times[config][-1]
            if shape.prefill:
                rate = f"{shape.work / us / 1e6:>8.0f} TFLOP/s"
            else:
                tb = shape.work / us / 1e6
                rate = f"{tb:>8.2f} TB/s {100 * tb / PEAK_TB:>4.0f} %"
            name = shape.name if place == 0 else ""
            print(f"{name:<18}{label(config):<30}{us:>9.2f} us{rate}", flush=True)
    best = [min(column) for column in zip(*times.values(), strict=True)]
    ratios = {
        config: math.exp(statistics.fmean(math.log(us / least) for us, least in zip(column, best, strict=True)))
        for config, column in times.items()
        if math.inf not in column
    }
    print("\ntime over the best of each shape, geometric mean and worst:")
    for config in sorted(ratios, key=ratios.__getitem__)[: len(ratios) if show_all else 8]:
        worst = max(us / least for us, least in zip(times[config], best, strict=True))
        each = " ".join(f"{us:.1f}" for us in times[config])
        print(f"  {label(config):<30}{ratios[config]:>6.3f}{worst:>7.2f}   us: {each}")
    print()
    return ratios


def main() -> None:
    """Compile, measure, print."""
    arguments = parse()
    begun = time.perf_counter()
    decode = [shape for model in arguments.models for shape in shapes(model, prefill=False)]
    prefill = [shape for model in arguments.models for shape in shapes(model, prefill=True)]
    jobs: list[tuple[Shape, Config]] = []
    if arguments.only != "prefill":
        jobs += cases(decode, decode_candidates())
    if arguments.only != "decode":
        jobs += cases(prefill, prefill_candidates())
    compile_on_all_cores(jobs, compile_one, find_gpu())

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16\n")
    torch.manual_seed(0)
    pool = torch.empty(2, POOL_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM, device="cuda", dtype=torch.bfloat16).normal_()
    if arguments.only != "prefill":
        print(f"decode; default {label(decode_config(HEAD_DIM, 2))}")
        sweep(decode, decode_candidates(), pool, arguments.all)
    if arguments.only != "decode":
        print(f"prefill; default {label(prefill_config(HEAD_DIM, 2))}")
        sweep(prefill, prefill_candidates(), pool, arguments.all)
    print(f"{time.perf_counter() - begun:.0f} s")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=HEADS, default=list(HEADS), help="whose shapes")
    parser.add_argument("--only", choices=("decode", "prefill"), help="one of the two")
    parser.add_argument("--all", action="store_true", help="print every candidate's time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
