"""What benchmarks say of their steps, from two snapshots of the engine; and the line of JSON."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mini_infer import LLMEngine, SamplingParams
from mini_infer.bench.report import BucketRow, StepUsage, bucket_table, commit_of, environment, last_line, percent
from mini_infer.bench.run import timed
from mini_infer.buckets import BucketUse
from mini_infer.metrics import StepTime
from mini_infer.step import StepKind
from tests.bench.conftest import small_work


def test_usage_is_what_ran_in_between(engine: LLMEngine) -> None:
    """Each bucket's steps and rows, none of those before; medians of the measured steps."""
    timed(engine, small_work(num_requests=5))
    before = engine.stats()
    work = small_work()
    timed(engine, work)
    after = engine.stats()
    usage = StepUsage(before, after)
    summary = usage.summary
    assert len(usage.step_times) == summary.decode_steps + summary.prefill_steps > 0
    assert summary.decode_steps == after.decode_steps - before.decode_steps
    decode = [row for row in usage.buckets if row.kind is StepKind.DECODE]
    prefill = [row for row in usage.buckets if row.kind is StepKind.PREFILL]
    assert sum(row.use.steps for row in decode) == summary.decode_steps
    assert sum(row.use.rows for row in decode) == work.output_tokens - len(work.prompts)
    assert sum(row.use.rows for row in prefill) == work.prompt_tokens
    assert summary.padded_rows == sum(row.use.padded for row in decode)
    assert 0 <= summary.decode_padding < 1 and summary.padding_ms >= 0 and summary.off_graph_steps == 0
    assert usage.buckets == sorted(usage.buckets, key=lambda row: (row.kind is StepKind.PREFILL, row.bucket))
    for row in usage.buckets:
        assert row.use.steps > 0
        measured = sorted(step.ms for step in usage.step_times if (step.kind, step.bucket) == (row.kind, row.bucket))
        assert len(measured) == row.use.steps
        assert row.measured_ms is not None and measured[0] <= row.measured_ms <= measured[-1]
        costs = after.decode_costs if row.kind is StepKind.DECODE else after.prefill_costs
        assert row.predicted_ms == pytest.approx(costs[row.bucket]) or row.kind is StepKind.DECODE
        assert row.predicted_ms >= costs[row.bucket] * (1 - 1e-9)


def test_predictions_are_means_with_the_contexts(engine: LLMEngine) -> None:
    """Of the steps in between alone: one row at 6, 7 and 8 tokens, at 0.5 ms each."""
    scheduler = engine._open().scheduler
    timed(engine, small_work(num_requests=5))
    before, cost = engine.stats(), scheduler.decode_buckets.cost(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "context_ms_per_token", 0.5)
        engine.generate([3, 4, 5, 6, 7], sampling_params=SamplingParams(max_tokens=4, ignore_eos=True))
    decode, prefill = StepUsage(before, engine.stats()).buckets
    assert (decode.use.steps, prefill.use.steps) == (3, 1)
    assert decode.predicted_ms == pytest.approx(cost + 0.5 * 7)
    assert prefill.predicted_ms == pytest.approx(scheduler.prefill_buckets.cost(5))


def test_usage_without_measured_steps(engine: LLMEngine) -> None:
    before = engine.stats()
    timed(engine, small_work(num_requests=3))
    usage = StepUsage(replace(before, step_times=()), replace(engine.stats(), step_times=()))
    assert usage.summary.decode_steps > 0 and usage.summary.gpu_idle is None
    assert all(row.measured_ms is None for row in usage.buckets)


def test_steps_are_not_measured_by_default(engine: LLMEngine) -> None:
    with LLMEngine(replace(engine.config, measure_steps=False)) as other:
        other.generate([3, 4, 5], max_tokens=2)
        assert other.stats().step_times == ()


def test_bucket_table() -> None:
    rows = [
        BucketRow(StepKind.DECODE, 8, BucketUse(10, 71, 9, 1.25), 2.0, 2.5),
        BucketRow(StepKind.PREFILL, 512, BucketUse(3, 1500, 36, 0.5), 4.0, None),
    ]
    head, decode, prefill = bucket_table(rows).splitlines()
    assert head.split() == [
        "step",
        "bucket",
        "steps",
        "rows",
        "padded",
        "padding",
        "ms",
        "predicted",
        "measured",
        "ratio",
    ]
    assert decode.split() == ["decode", "8", "10", "71", "9", "1.2", "2.000", "2.500", "1.25"]
    assert prefill.split() == ["prefill", "512", "3", "1500", "36", "0.5", "4.000", "-", "-"]
    assert len(head) == len(decode) == len(prefill)


def test_percent() -> None:
    assert percent(None) == "-" and percent(0.0312) == "3.1%"


@dataclass
class Figures:
    value: float


@pytest.mark.parametrize("results", [Figures(1.5), [Figures(1.5)]], ids=["one", "list"])
def test_last_line(results: Figures | list[Figures]) -> None:
    line = last_line("name", {"model": "shape", "seed": 0}, results)
    assert "\n" not in line
    report = json.loads(line)
    assert (report["benchmark"], report["model"], report["options"]["seed"]) == ("name", "shape", 0)
    assert report.items() >= environment().items()
    assert report["results"] == ([{"value": 1.5}] if isinstance(results, list) else {"value": 1.5})


def test_environment() -> None:
    named = environment()
    assert set(named) == {"device", "torch", "triton", "python", "mini_infer", "commit"} and all(named.values())


def test_commit(tmp_path: Path) -> None:
    """Of the checkout that has the file; a change since shows; a file that is not in it has none."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    file = tmp_path / "file.py"
    file.write_text("1")
    assert commit_of(file) == "unknown"
    git("init", "-q")
    assert commit_of(file) == "unknown"
    git("add", "file.py")
    git("commit", "-q", "-m", "first")
    git("tag", "-m", "a release", "v1")
    head = git("rev-parse", "--short", "HEAD")
    assert commit_of(file) == head
    file.write_text("2")
    assert commit_of(file) == f"{head}-dirty"


def test_step_times_are_records_of_what_was_scheduled(engine: LLMEngine) -> None:
    """Numbered in order, one row a token, none of them later than the next."""
    timed(engine, small_work(num_requests=1))  # an engine's first step has no gap before it
    before = engine.stats()
    work = small_work(num_requests=6)
    timed(engine, work)
    steps: tuple[StepTime, ...] = StepUsage(before, engine.stats()).step_times
    assert [step.step for step in steps] == sorted({step.step for step in steps})
    assert sum(len(step.request_ids) for step in steps) == work.output_tokens
    assert [step.read_back for step in steps] == sorted(step.read_back for step in steps)
    assert all(step.ms > 0 and step.gap_ms is not None and step.gap_ms > 0 for step in steps)
