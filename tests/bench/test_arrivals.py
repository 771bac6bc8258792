"""Workloads that arrive over time: who is added when, and what the times of the tokens come to."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.bench.arrivals import Distribution, bench_arrivals, play, token_times
from mini_infer.bench.report import StepUsage
from mini_infer.bench.workloads import Work
from mini_infer.metrics import StepTime
from mini_infer.step import StepKind
from tests.bench.conftest import small_work


def step_of(read_back: float, *request_ids: str) -> StepTime:
    return StepTime(1, StepKind.DECODE, 8, request_ids, 1.0, 0.0, read_back)


def test_distribution() -> None:
    spread = Distribution.of([float(value) for value in range(101)])
    assert (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.largest) == (50, 50, 90, 95, 99, 100)
    assert Distribution.of([2.0]) == Distribution(2.0, 2.0, 2.0, 2.0, 2.0, 2.0)


def test_token_times_by_hand() -> None:
    """One time for all rows of a step; a surplus step after the last token and strangers count for nobody."""
    steps = [step_of(1.0, "a"), step_of(2.0, "a", "b"), step_of(2.5, "c"), step_of(4.0, "a", "b"), step_of(5.0, "a")]
    assert token_times(steps, {"a": 3, "b": 2}) == {"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0]}


def test_every_token_of_every_request_has_its_time(engine: LLMEngine) -> None:
    """Against the engine's own times of the first and the last token, under load and with several steps in flight."""
    for steps_in_flight in (1, 3):
        config = replace(engine.config, steps_in_flight=steps_in_flight, num_gpu_blocks=12)
        with LLMEngine(config) as other:
            work = small_work()
            outputs = other.generate(work.prompts, sampling_params=work.sampling)
            steps = other.stats().step_times
            times = token_times(steps, {o.request_id: len(o.token_ids) for o in outputs})
            moments = [step.read_back for step in steps]
            after = dict(zip(moments, [*moments[1:], math.inf], strict=True))  # when the next step was read back
            for output in outputs:
                got = times[output.request_id]
                assert len(got) == len(output.token_ids) and got == sorted(set(got))
                assert got[0] <= output.timings.first_token < after[got[0]]
                assert got[-1] <= output.timings.finished < after[got[-1]]


def test_preempted_requests_keep_their_times(engine: LLMEngine) -> None:
    """Blocks for few: whoever is preempted comes back with the token after its last one, once."""
    config = replace(engine.config, num_gpu_blocks=10, block_size=8, max_model_len=80, preemption="recompute")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with LLMEngine(config) as other:
        outputs = other.generate([[5 + row] * 6 for row in range(4)], sampling_params=params)
        stats = other.stats()
    assert stats.preemptions["recompute"] > 0
    times = token_times(stats.step_times, {output.request_id: 40 for output in outputs})
    assert all(len(got) == 40 and got == sorted(set(got)) for got in times.values())


def test_requests_are_added_when_they_are_due(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, and no step runs while there is nothing to do: the loop sleeps."""
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    work = Work(0, [[3], [4], [5]], [params] * 3, [0.0, 0.0, 0.15])
    added: list[float] = []
    add_request, step = engine.add_request, engine.step

    def spy(*args: object, **keywords: object) -> str:
        added.append(time.perf_counter())
        return add_request(*args, **keywords)  # type: ignore[arg-type]

    def counted() -> object:
        assert engine.has_unfinished_requests, "a step of nothing"
        return step()

    monkeypatch.setattr(engine, "add_request", spy)
    monkeypatch.setattr(engine, "step", counted)
    begun = time.perf_counter()
    ended = play(engine, work)
    assert [request.num_tokens for request in ended.values()] == [2, 2, 2]
    assert added[2] - begun >= 0.15
    dues = sorted(request.arrival for request in ended.values())
    assert dues[0] == dues[1] and dues[2] - dues[0] == pytest.approx(0.15)
    assert dues[0] >= begun


def test_times_count_from_the_prescribed_arrival(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is late to add requests is no excuse."""
    add_request = engine.add_request

    def slow(*args: object, **keywords: object) -> str:
        time.sleep(0.02)
        return add_request(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "add_request", slow)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    result, _ = bench_arrivals(engine, Work(0, [[3]] * 5, [params] * 5, [0.0] * 5))
    assert result.ttft_ms.p50 > 100, "all five are added before the first step"


def test_bench_arrivals(engine: LLMEngine) -> None:
    """The figures fit each other and the workload."""
    work = small_work(rate=200.0)
    assert work.arrivals is not None
    result, usage = bench_arrivals(engine, work)
    assert (result.seed, result.prompt_tokens, result.output_tokens) == (11, work.prompt_tokens, work.output_tokens)
    assert result.wall_s >= work.arrivals[-1]
    assert result.requests_per_s == pytest.approx(20 / result.wall_s)
    assert result.output_tokens_per_s == pytest.approx(work.output_tokens / result.wall_s)
    for spread in (result.ttft_ms, result.itl_ms, result.latency_ms):
        assert 0 < spread.p50 <= spread.p90 <= spread.p95 <= spread.p99 <= spread.largest
    # A request's latency is its TTFT and its gaps: so are the sums.
    num_gaps = work.output_tokens - 20
    total = 20 * result.ttft_ms.mean + num_gaps * result.itl_ms.mean
    assert total == pytest.approx(20 * result.latency_ms.mean)
    assert result.steps is usage.summary and isinstance(usage, StepUsage)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_arrivals_are_needed(engine: LLMEngine) -> None:
    with pytest.raises(AssertionError, match="all there at once"):
        play(engine, small_work())


@pytest.mark.gpu
def test_arrivals_on_a_gpu(engine: LLMEngine) -> None:
    """Through captured graphs, with steps in flight."""
    config: EngineConfig = replace(engine.config, device="cuda", num_gpu_blocks=400)
    with LLMEngine(config) as other:
        work = small_work(rate=500.0)
        result, usage = bench_arrivals(other, work)
        assert result.steps.off_graph_steps == 0
        assert sum(len(step.request_ids) for step in usage.step_times) >= work.output_tokens
        assert all(step.ms > 0 for step in usage.step_times)
