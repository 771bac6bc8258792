"""Benchmarks with dummy weights of a real shape; the same as ``mini-infer bench``.

python scripts/bench.py latency --model qwen3-0.6b --batch 1 64 256
"""

from __future__ import annotations

import sys

from mini_infer.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
