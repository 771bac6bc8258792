"""A tiny engine that measures its steps, and workloads that fit it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.bench.workloads import Work
from tests.tiny_models import VOCAB_SIZE, make_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_model("llama3-gqa", path, num_hidden_layers=1)
    return path


@pytest.fixture(scope="session")
def options(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder),
        "load_format": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_model_len": 128,
        "measure_steps": True,
        "enable_prefix_caching": False,
        "num_cpu_blocks": 0,
        "progress": False,
    }


@pytest.fixture(scope="module")
def engine(options: dict[str, Any]) -> Iterator[LLMEngine]:
    with LLMEngine(EngineConfig(**options)) as engine:
        yield engine


def small_work(rate: float | None = None, *, num_requests: int = 20) -> Work:
    """Short prompts and outputs, drawn with seed 11; exponential gaps if there is a rate."""
    draw = random.Random(11)
    prompts = [[draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, 30))] for _ in range(num_requests)]
    sampling = [SamplingParams(temperature=0.6, max_tokens=draw.randint(1, 12), ignore_eos=True) for _ in prompts]
    if rate is None:
        return Work(11, prompts, sampling)
    arrivals, now = [], 0.0
    for _ in prompts:
        now += draw.expovariate(rate)
        arrivals.append(now)
    return Work(11, prompts, sampling, arrivals)


def small_latency(batch: int, output_tokens: int) -> Work:
    """In place of the latency workload, whose token ids a tiny vocabulary does not have."""
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    return Work(batch, [[3 + row, 4, 5] for row in range(batch)], [params] * batch)


@pytest.fixture(autouse=True)
def small_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workload is a small one."""
    monkeypatch.setattr("mini_infer.bench.workloads.latency", small_latency)
    monkeypatch.setattr("mini_infer.bench.workloads.sharegpt_1500", small_work)
    names = ("bench-256", "prefill-64x2048", "sharegpt-1500")
    monkeypatch.setattr("mini_infer.bench.workloads.THROUGHPUT", dict.fromkeys(names, small_work))
