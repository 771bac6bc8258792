"""Every op against plain PyTorch and against the machine: microseconds, rates, share of the ceiling, speed-ups.

    python scripts/bench_kernels.py
    python scripts/bench_kernels.py --ops rmsnorm rope --compile --plot roofline.png

An op's own GPU tests run first; while one of them fails the op gets no figures. Times are medians of captured graphs
("graph": what a step of the engine pays) and of plain calls ("eager": with the launch from Python), which op and
baseline take in turns. The baseline is the formula in torch ops, for the products cuBLAS. Ceilings (reading, copying,
multiplying) are measured in the same run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kernel_cases import OPS, Case, randn, size
from read_kernel import read_all

from mini_infer.bench.plotting import load_pyplot
from mini_infer.bench.report import environment
from mini_infer.exceptions import ConfigError

CALLS = 20  # in a graph
REPLAYS = 9
CALLED_FOR_US = 2_000  # from Python, at a time
TURNS = 45
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row:
    """One line of the table; times in microseconds, ratios of the baseline's time to ours."""

    op: str
    shape: str
    graph_us: float
    eager_us: float
    rate: float
    unit: str
    ceiling: float
    plain_graph: float
    plain_eager: float
    compiled_graph: float | None
    intensity: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine gives.

    Attributes:
        read, copy: Bytes a second, read alone and read plus written.
        matmul: Operations a second of a large bfloat16 product.
    """

    read: float
    copy: float
    matmul: float


def spent(run: Callable[[], object], repeats: int) -> float:
    """Median microseconds of one `run` on the GPU."""
    run()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events:
        event.record()
        if event is not events[-1]:
            run()
    torch.cuda.synchronize()
    times = [float(a.elapsed_time(b)) for a, b in itertools.pairwise(events)]
    return median(times) * 1e3


def in_graph(call: Callable[[int], object]) -> float:
    """Microseconds of one call within a captured graph of `CALLS` of them."""
    for index in range(2):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(index)
    return spent(graph.replay, REPLAYS) / CALLS


def by_call(ours: Callable[[int], object], plain: Callable[[int], object]) -> tuple[float, float]:
    """A call of ours from Python, launches and all: median microseconds, and the median of how many times plain's.

    They take turns, and each turn gives a ratio, since the host's pace varies.
    """

    def microseconds(call: Callable[[int], object], times: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for index in range(times):
            call(index)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / times

    calls = ours, plain
    for call in calls:
        call(0)  # what is done once
    times = [max(int(CALLED_FOR_US / microseconds(call, CALLS)), 1) for call in calls]
    turns = [[microseconds(call, count) for call, count in zip(calls, times, strict=True)] for _ in range(TURNS)]
    return median(our_us for our_us, _ in turns), median(plain_us / our_us for our_us, plain_us in turns)


def measure_ceilings() -> Ceilings:
    """Read as fast as a kernel that only reads can, copy and multiply as fast as the libraries can."""
    big = torch.ones(1 << 30, device="cuda", dtype=torch.bfloat16)  # 2 GiB
    other = torch.empty_like(big)
    a, b = randn(8192, 8192), randn(8192, 8192)
    read = size(big) / spent(lambda: read_all(big.view(torch.int32)), 5) * 1e6
    copy = 2 * size(big) / spent(lambda: other.copy_(big), 5) * 1e6
    matmul = 2 * 8192**3 / spent(lambda: a @ b, 5) * 1e6
    return Ceilings(read, copy, matmul)


def measure(case: Case, ceilings: Ceilings, *, compiled: bool) -> Row:
    """Time one case."""
    graph_us = in_graph(case.ours)
    eager_us, plain_eager = by_call(case.ours, case.plain)
    memory = max(ceilings.read, ceilings.copy)
    bound_by_memory = case.flops / ceilings.matmul <= case.bytes / memory
    work, ceiling, unit = (case.bytes, memory, "TB/s") if bound_by_memory else (case.flops, ceilings.matmul, "TFLOP/s")
    rate = work / graph_us * 1e6
    plain = case.plain
    return Row(
        op=case.op,
        shape=case.shape,
        graph_us=graph_us,
        eager_us=eager_us,
        rate=rate / 1e12,
        unit=unit,
        ceiling=rate / ceiling,
        plain_graph=in_graph(plain) / graph_us,
        plain_eager=plain_eager,
        compiled_graph=in_graph(torch.compile(plain, dynamic=False)) / graph_us if compiled else None,
        intensity=case.flops / case.bytes,
    )


def tests_pass(files: Sequence[str]) -> bool:
    """Run the GPU tests of an op."""
    paths = [str(ROOT / "tests" / "kernels" / name) for name in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *paths], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-5:]))
    return done.returncode == 0


def show(row: Row) -> None:
    """Print one line."""
    ratios = (row.plain_graph, row.plain_eager, row.compiled_graph)
    cells = "".join(f"{'-' if ratio is None else f'{ratio:.1f}x':>9}" for ratio in ratios)
    print(
        f"{row.op:<24}{row.shape:<30}{row.graph_us:>9.2f}{row.eager_us:>9.2f}{row.rate:>9.2f} {row.unit:<8}"
        f"{100 * row.ceiling:>5.0f} %{cells}",
        flush=True,
    )


def plot(pyplot: Any, rows: Sequence[Row], ceilings: Ceilings, path: Path) -> None:
    """The roofline: TFLOP/s against operations per byte, for the ops that use the tensor cores."""
    figure, axes = pyplot.subplots(figsize=(9, 6))
    memory = max(ceilings.read, ceilings.copy)
    intensities = [2.0**power for power in range(-1, 13)]
    roof = [min(ceilings.matmul, memory * intensity) / 1e12 for intensity in intensities]
    axes.loglog(intensities, roof, color="black", label="ceiling measured in this run")
    for op in dict.fromkeys(row.op for row in rows if row.intensity):
        points = [row for row in rows if row.op == op]
        rates = [row.rate if row.unit == "TFLOP/s" else row.rate * row.intensity for row in points]
        axes.loglog([row.intensity for row in points], rates, "o", label=op)
    axes.set(xlabel="operations per byte", ylabel="TFLOP/s", title=torch.cuda.get_device_name())
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Test, measure, print. Returns the exit status: 1 if an op's tests failed."""
    arguments = parse()
    if not torch.cuda.is_available():
        print("bench_kernels: there is no GPU to measure on", file=sys.stderr)
        return 1
    try:
        pyplot = load_pyplot(arguments.plot) if arguments.plot else None
    except ConfigError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(json.dumps(environment()))
    print(
        f"ceilings: read {ceilings.read / 1e12:.2f} TB/s, copy {ceilings.copy / 1e12:.2f} TB/s, bfloat16 product ",
        end="",
    )
    print(f"{ceilings.matmul / 1e12:.0f} TFLOP/s\n")
    print(f"{'op':<24}{'shape':<30}{'graph us':>9}{'eager us':>9}{'rate':>9} {'':<8}{'share':>7}", end="")
    print(f"{'graph':>9}{'eager':>9}{'compile':>9}")
    rows: list[Row] = []
    red = []
    for name in arguments.ops:
        cases, files = OPS[name]
        if not arguments.skip_tests and not tests_pass(files):
            print(f"{name}: its tests fail, so there are no figures")
            red.append(name)
            continue
        for case in cases():
            rows.append(measure(case, ceilings, compiled=arguments.compile))
            show(rows[-1])
    if arguments.plot:
        plot(pyplot, rows, ceilings, arguments.plot)
    print(json.dumps({"benchmark": "kernels", **environment(), "red": red, "results": [asdict(row) for row in rows]}))
    return 1 if red else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="which ops")
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile as well (slow)")
    parser.add_argument("--skip-tests", action="store_true", help="the tests were run just now")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="roofline plot")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
