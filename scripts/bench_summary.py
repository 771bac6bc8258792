"""A short table of benchmarks: reads what `mini-infer bench` printed, and keeps to the JSON lines.

mini-infer bench latency bench-256 --model qwen3-0.6b | python scripts/bench_summary.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def main() -> None:
    """Print a line for each figure of the benchmarks on standard input.

    Raises:
        SystemExit: there are none.
    """
    lines = list(summarize(sys.stdin))
    if not lines:
        raise SystemExit("bench_summary: no benchmark's line of JSON on standard input")
    print("\n".join(lines))


def summarize(lines: Iterable[str]) -> Iterator[str]:
    """A line for each figure."""
    for line in lines:
        if line.startswith('{"benchmark"'):
            report = json.loads(line)
            for name, figures in rows(report["benchmark"], report["results"]):
                yield f"{report['model']:<14} {name:<16} {figures}"


def rows(benchmark: str, results: Any) -> Iterator[tuple[str, str]]:
    """(name, figures) of the latency benchmark's batches, or of a workload."""
    if benchmark == "latency":
        for row in results:
            figures = f"{row['decode_ms']:.3f} ms a step (median {row['median_ms']:.3f}), TTFT {row['ttft_ms']:.1f} ms"
            yield f"latency, {row['batch']}", f"{figures}, {idle(row)}, {row['off_graph_steps']} off graph"
    elif "walls_s" in results:
        steps = results["steps"]
        yield (
            benchmark,
            f"{results['output_tokens_per_s']:,.0f} output tok/s, {results['prompt_tokens_per_s']:,.0f} prompt tok/s, "
            f"padding {steps['decode_padding']:.1%}, {idle(steps)}, {steps['off_graph_steps']} off graph",
        )


def idle(figures: dict[str, Any]) -> str:
    """How idle the GPU was, for people."""
    return "GPU idle unknown" if figures["gpu_idle"] is None else f"GPU idle {figures['gpu_idle']:.1%}"


if __name__ == "__main__":
    main()
