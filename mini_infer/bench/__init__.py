"""Seeded benchmarks of the engine: the code behind ``mini-infer bench`` and ``scripts/bench.py``."""
