"""Latency and throughput of a tiny engine: the figures fit each other."""

from __future__ import annotations

import pytest

from mini_infer import LLMEngine, SamplingParams
from mini_infer.bench import run
from mini_infer.bench.arrivals import bench_arrivals
from mini_infer.bench.run import bench_latency, bench_throughput, timed
from mini_infer.bench.workloads import Work
from mini_infer.exceptions import ConfigError, MiniInferError
from tests.bench.conftest import small_work


def test_latency(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best and median of the repeats, by walls that are given: 11 steps are the difference of 12 tokens and 1."""
    walls = iter([9.0, 1.75, 1.2, 0.1, 0.2] * 2)  # the warm-up's, two long ones, two short ones
    timed, lengths = run.timed, []

    def pretended(engine: LLMEngine, work: Work) -> float:
        timed(engine, work)
        lengths.append({params.max_tokens for params in work.sampling})
        return next(walls)

    monkeypatch.setattr(run, "timed", pretended)
    rows = bench_latency(engine, [1, 3], output_tokens=12, repeats=2)
    assert lengths == [{12}, {12}, {12}, {1}, {1}] * 2
    assert [(row.batch, row.seed, row.off_graph_steps) for row in rows] == [(1, 1, 0), (3, 3, 0)]
    for row in rows:
        assert (row.decode_ms, row.ttft_ms) == (pytest.approx(1.1 / 11 * 1e3), pytest.approx(100.0))
        assert row.median_ms == pytest.approx((1.475 - 0.15) / 11 * 1e3)
        assert row.gpu_idle is not None and 0 < row.gpu_idle < 1


def test_workloads_that_are_too_long(engine: LLMEngine) -> None:
    """Refused with the length and the bound before anything runs; what just fits is run."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    assert engine.max_model_len == 128
    assert timed(engine, Work(0, [[5] * 120], [params])) > 0
    finished = engine.stats().num_finished
    work = Work(0, [[5], [5] * 121], [params] * 2, [0.0, 0.0])
    for run_it in (timed, bench_arrivals):
        with pytest.raises(ConfigError, match=r"up to 129 tokens; max_model_len must be at least that, got 128"):
            run_it(engine, work)
    assert engine.stats().num_finished == finished


def test_a_request_that_fails_is_no_figure(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workload that was not generated to its end has no time."""
    generate = engine.generate

    def cut_short(prompts: list[list[int]], *, sampling_params: list[SamplingParams]) -> object:
        outputs = generate(prompts, sampling_params=sampling_params)
        outputs[1].token_ids.pop()
        return outputs

    monkeypatch.setattr(engine, "generate", cut_short)
    with pytest.raises(MiniInferError, match="came to no end"):
        timed(engine, small_work(num_requests=3))


def test_throughput(engine: LLMEngine) -> None:
    work = small_work()
    result, usage = bench_throughput(engine, work)
    assert result.walls_s == (result.wall_s,) and result.spread == 0.0 and result.seed == 11
    assert result.output_tokens_per_s == pytest.approx(work.output_tokens / result.wall_s)
    assert result.prompt_tokens_per_s == pytest.approx(work.prompt_tokens / result.wall_s)
    assert result.steps is usage.summary
    assert sum(len(step.request_ids) for step in usage.step_times) == work.output_tokens, "the warm-up counts, too"


@pytest.mark.parametrize(
    ("walls", "wall", "spread"), [([3.0, 1.0, 2.0], 2.0, 1.0), ([1.0, 2.0], 1.0, 1.0), ([4.0, 1.0, 2.0, 3.0], 2.0, 1.5)]
)
def test_repeats(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, walls: list[float], wall: float, spread: float
) -> None:
    """The figures are those of one run, the one with the median time (of an even number the lower)."""
    left = iter([0.0, *walls])  # the warm-up's first
    timed = run.timed
    sizes = iter([1, *range(2, 2 + len(walls))])

    def pretended(engine: LLMEngine, work: object) -> float:
        timed(engine, small_work(num_requests=next(sizes)))
        return next(left)

    monkeypatch.setattr(run, "timed", pretended)
    result, usage = bench_throughput(engine, small_work(), repeats=len(walls))
    assert (result.wall_s, result.walls_s, result.spread) == (wall, tuple(walls), pytest.approx(spread))
    num_requests = 2 + walls.index(wall)
    assert len({name for step in usage.step_times for name in step.request_ids}) == num_requests
