"""Benchmarks with dummy weights of a real shape; the same as ``mini-infer bench``.

python scripts/bench.py latency --model qwen3-0.6b --batch 1 64 256
"""

from __future__ import annotations

import argparse

from mini_infer.bench.arguments import add_arguments
from mini_infer.bench.command import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())
