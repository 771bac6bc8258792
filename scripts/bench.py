"""Benchmarks with dummy weights of a real shape: latency, throughput and prefill. The last line is one JSON object.

python scripts/bench.py latency --model qwen3-0.6b --batch 1 64 256
"""

from __future__ import annotations

import argparse

from mini_infer import EngineConfig, LLMEngine
from mini_infer.bench import workloads
from mini_infer.bench.run import bench_latency, bench_throughput, bucket_table, environment, last_line


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("latency", "bench-256", "prefill-64x2048", "sharegpt-1500"))
    parser.add_argument(
        "--model", default="qwen3-0.6b", help=f"one of {', '.join(workloads.shape_names())}, or a folder"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes of the latency benchmark")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--steps-in-flight", type=int, default=2)
    parser.add_argument("--prefill-share", type=float, default=0.9)
    parser.add_argument("--eager", action="store_true", help="run without captured graphs")
    arguments = parser.parse_args()
    for name, value in environment().items():
        print(f"{name:<12}{value}")
    config = EngineConfig(
        model=workloads.shape_folder(arguments.model),
        load_format="dummy",
        dtype=arguments.dtype,
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        steps_in_flight=arguments.steps_in_flight,
        prefill_share=arguments.prefill_share,
        capture_graphs=not arguments.eager,
        enable_prefix_caching=False,
        num_cpu_blocks=0,
        progress=False,
    )
    with LLMEngine(config) as engine:
        stats = engine.stats()
        print(stats.startup.describe())
        print(stats.memory.describe())
        if arguments.benchmark == "latency":
            rows = bench_latency(engine, arguments.batch or workloads.latency_batches())
            print(f"{'batch':>6}{'decode ms':>11}{'median':>9}{'TTFT ms':>9}{'off graph':>11}")
            for row in rows:
                print(
                    f"{row.batch:>6}{row.decode_ms:>11.3f}{row.median_ms:>9.3f}{row.ttft_ms:>9.1f}"
                    f"{row.off_graph_steps:>11}"
                )
            print(last_line("latency", arguments.model, rows))
            return
        work = {
            "bench-256": workloads.bench_256,
            "prefill-64x2048": workloads.prefill_64x2048,
            "sharegpt-1500": workloads.sharegpt_1500,
        }[arguments.benchmark]()
        result = bench_throughput(engine, work)
        print(bucket_table(engine.stats()))
        print(
            f"{result.wall_s:.2f} s, {result.prompt_tokens_per_s:,.0f} prompt tok/s, "
            f"{result.output_tokens_per_s:,.0f} output tok/s, padding {result.decode_padding:.1%}"
        )
        print(last_line(arguments.benchmark, arguments.model, result))


if __name__ == "__main__":
    main()
