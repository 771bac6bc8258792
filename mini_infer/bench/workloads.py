"""The benchmarks' workloads: exact and seeded, described by the JSON files beside this one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mini_infer.sampling import SamplingParams

DATA = Path(str(files("mini_infer.bench"))) / "data"


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts, how each is sampled, and when each arrives.

    Attributes:
        seed: What the prompts and arrivals are drawn with.
        prompts: Token ids.
        sampling: One for each prompt.
        arrivals: Seconds after the start, ascending; None if all are there at once.
    """

    seed: int
    prompts: list[list[int]]
    sampling: list[SamplingParams]
    arrivals: list[float] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        """Tokens to generate."""
        return sum(params.max_tokens for params in self.sampling)


def shape_folder(name: str) -> str:
    """Folder of a model: a bundled shape (a bare config, for dummy weights), or ``name`` itself."""
    bundled = DATA / "shapes" / name
    return str(bundled) if bundled.is_dir() else name


def shape_names() -> list[str]:
    """The bundled shapes."""
    return sorted(path.name for path in (DATA / "shapes").iterdir())


def latency(batch: int, output_tokens: int) -> Work:
    """``batch`` requests at once, 128 random prompt tokens each, greedy."""
    spec = _read("latency")
    draw = random.Random(batch)
    prompts = [[draw.randint(0, 10000) for _ in range(spec["prompt_tokens"])] for _ in range(batch)]
    params = SamplingParams(temperature=spec["temperature"], max_tokens=output_tokens, ignore_eos=True)
    return Work(batch, prompts, [params] * batch)


def latency_batches() -> list[int]:
    """Batch sizes of the latency workload."""
    return list(_read("latency")["batch_sizes"])


def bench_256() -> Work:
    """256 requests of 100 to 1024 prompt tokens and 100 to 1024 output tokens, temperature 0.6."""
    spec = _read("bench-256")
    draw = random.Random(spec["seed"])
    low, high = spec["token_ids"]
    prompts = [
        [draw.randint(low, high) for _ in range(draw.randint(*spec["prompt_tokens"]))]
        for _ in range(spec["num_requests"])
    ]
    sampling = [
        SamplingParams(
            temperature=spec["temperature"], max_tokens=draw.randint(*spec["output_tokens"]), ignore_eos=True
        )
        for _ in prompts
    ]
    work = Work(spec["seed"], prompts, sampling)
    assert work.prompt_tokens == spec["expected_prompt_tokens"], work.prompt_tokens
    assert work.output_tokens == spec["expected_output_tokens"], work.output_tokens
    return work


def prefill_64x2048() -> Work:
    """64 prompts of 2048 tokens, 16 output tokens each, greedy."""
    spec = _read("prefill-64x2048")
    seed = 0
    draw = random.Random(seed)
    prompts = [[draw.randint(0, 10000) for _ in range(spec["prompt_tokens"])] for _ in range(spec["num_requests"])]
    params = SamplingParams(temperature=spec["temperature"], max_tokens=spec["output_tokens"], ignore_eos=True)
    return Work(seed, prompts, [params] * len(prompts))


def sharegpt_1500(rate: float | None = None) -> Work:
    """1,500 requests with the lengths of real conversations.

    Args:
        rate: Requests a second, with exponential gaps; None for all at once.
    """
    spec = _read("sharegpt-1500")
    lengths = json.loads((DATA / spec["lengths_file"]).read_text())[: spec["num_requests"]]
    draw = random.Random(spec["seed"])
    low, high = spec["token_ids"]
    prompts = [[draw.randint(low, high) for _ in range(prompt)] for prompt, _ in lengths]
    sampling = [
        SamplingParams(temperature=spec["temperature"], max_tokens=output, ignore_eos=True) for _, output in lengths
    ]
    if rate is None:
        return Work(spec["seed"], prompts, sampling)
    gaps = random.Random(spec["seed"])
    arrivals, now = [], 0.0
    for _ in prompts:
        now += gaps.expovariate(rate)
        arrivals.append(now)
    return Work(spec["seed"], prompts, sampling, arrivals)


THROUGHPUT: Mapping[str, Callable[[], Work]] = MappingProxyType(
    {"bench-256": bench_256, "prefill-64x2048": prefill_64x2048, "sharegpt-1500": sharegpt_1500}
)
"""Workloads whose requests are all there at once, by name."""


def _read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return value
