"""The workloads are exact: the same tokens and arrivals everywhere, always."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import pytest


@pytest.fixture
def workloads(small_workloads: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module itself, without what the other tests put in its place."""
    monkeypatch.undo()
    yield importlib.import_module("mini_infer.bench.workloads")


def test_sharegpt_arrivals(workloads: ModuleType) -> None:
    """Exponential gaps from a seed of their own: a rate changes when requests come, not which."""
    offline, slow, fast = (workloads.sharegpt_1500(rate) for rate in (None, 10.0, 20.0))
    assert offline.arrivals is None and offline.seed == slow.seed == 7
    assert offline.prompts == slow.prompts == fast.prompts and offline.sampling == slow.sampling
    assert len(slow.arrivals) == 1500 and all(0 < before < after for before, after in pairwise(slow.arrivals))
    assert slow.arrivals == pytest.approx([2 * arrival for arrival in fast.arrivals])
    assert 1500 / slow.arrivals[-1] == pytest.approx(10.0, rel=0.1)


def test_totals(workloads: ModuleType) -> None:
    totals = {
        name: (len(work.prompts), work.prompt_tokens, work.output_tokens, work.seed)
        for name, work in ((name, make()) for name, make in workloads.THROUGHPUT.items())
    }
    assert totals["bench-256"] == (256, 142827, 133966, 0)
    assert totals["prefill-64x2048"] == (64, 64 * 2048, 64 * 16, 0)
    lengths = json.loads((workloads.DATA / "sharegpt-lengths.json").read_text())[:1500]
    prompt, output = (sum(column) for column in zip(*lengths, strict=True))
    assert totals["sharegpt-1500"] == (1500, prompt, output, 7)


def test_latency(workloads: ModuleType) -> None:
    work = workloads.latency(3, 5)
    assert [len(prompt) for prompt in work.prompts] == [128] * 3 and work.output_tokens == 15 and work.seed == 3
    assert work.prompts == workloads.latency(3, 1).prompts
