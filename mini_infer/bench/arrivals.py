"""Running a workload whose requests arrive over time: TTFT, ITL and end-to-end latency as its users see them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mini_infer.bench.report import StepSummary, StepUsage
from mini_infer.bench.run import check_lengths, warm_up
from mini_infer.bench.workloads import Work
from mini_infer.engine import LLMEngine
from mini_infer.metrics import StepTime


@dataclass(frozen=True, slots=True)
class Distribution:
    """How values spread.

    Attributes:
        mean: Their mean.
        p50, p90, p95, p99: Percentiles, linear between two values.
        largest: The largest.
    """

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution:
        """The distribution of at least one value."""
        p50, p90, p95, p99 = np.percentile(values, (50, 90, 95, 99)).tolist()
        return cls(float(np.mean(values)), p50, p90, p95, p99, max(values))


@dataclass(frozen=True, slots=True)
class ArrivalResult:
    """What a workload with arrivals came to.

    Attributes:
        seed: Seed of the workload.
        wall_s: Seconds from its beginning to the last token.
        requests_per_s: Requests over ``wall_s``.
        prompt_tokens, output_tokens: Tokens of the workload.
        output_tokens_per_s: Output tokens over ``wall_s``.
        ttft_ms: From a request's prescribed arrival to its first token, in milliseconds.
        itl_ms: Between two tokens of a request, the gaps of all requests together.
        latency_ms: From a request's prescribed arrival to its last token.
        steps: What the steps came to.
    """

    seed: int
    wall_s: float
    requests_per_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    ttft_ms: Distribution
    itl_ms: Distribution
    latency_ms: Distribution
    steps: StepSummary


@dataclass(frozen=True, slots=True)
class Arrived:
    """One request of a workload that was played.

    Attributes:
        arrival: When it was to arrive, in seconds of `time.perf_counter`.
        num_tokens: Tokens that it generated.
    """

    arrival: float
    num_tokens: int


def bench_arrivals(engine: LLMEngine, work: Work) -> tuple[ArrivalResult, StepUsage]:
    """Play a workload with arrivals.

    Args:
        engine: Idle, with ``measure_steps`` on; it is warmed up here.
        work: A workload with arrivals, of at least two tokens for some request.

    Returns:
        The result, and the steps.

    Raises:
        ConfigError: the engine's ``max_model_len`` is too small for it.
    """
    check_lengths(engine, work)
    warm_up(engine)
    before = engine.stats()
    begun = time.perf_counter()
    requests = play(engine, work)
    wall = time.perf_counter() - begun
    usage = StepUsage(before, engine.stats())
    times = token_times(usage.step_times, {name: request.num_tokens for name, request in requests.items()})
    result = ArrivalResult(
        seed=work.seed,
        wall_s=wall,
        requests_per_s=len(requests) / wall,
        prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens,
        output_tokens_per_s=work.output_tokens / wall,
        ttft_ms=Distribution.of([(times[name][0] - request.arrival) * 1e3 for name, request in requests.items()]),
        itl_ms=Distribution.of([(after - token) * 1e3 for got in times.values() for token, after in pairwise(got)]),
        latency_ms=Distribution.of([(times[name][-1] - request.arrival) * 1e3 for name, request in requests.items()]),
        steps=usage.summary,
    )
    return result, usage


def play(engine: LLMEngine, work: Work) -> dict[str, Arrived]:
    """Add each request when it is due, and run steps while there are any to run. Returns the requests by their ids."""
    assert work.arrivals is not None, "the requests of this workload are all there at once"
    begun = time.perf_counter()
    due = [begun + arrival for arrival in work.arrivals]
    arrivals: dict[str, float] = {}
    ended: dict[str, Arrived] = {}
    while len(ended) < len(due):
        while len(arrivals) < len(due) and due[len(arrivals)] <= time.perf_counter():
            index = len(arrivals)
            request_id = engine.add_request(work.prompts[index], sampling_params=work.sampling[index])
            arrivals[request_id] = due[index]
        if len(ended) == len(arrivals):
            time.sleep(max(0.0, due[len(arrivals)] - time.perf_counter()))
            continue
        for output in engine.step():
            engine.get_output(output.request_id)
            assert output.error is None, f"{output.request_id}: {output.error}"
            ended[output.request_id] = Arrived(arrivals[output.request_id], len(output.token_ids))
    return ended


def token_times(steps: Iterable[StepTime], num_tokens: Mapping[str, int]) -> dict[str, list[float]]:
    """When each token of each request was read back: the step that it came from was read back once for all its rows.

    Args:
        steps: In order, all that the requests were in.
        num_tokens: Tokens that each request generated; what later steps computed for it was dropped.
    """
    times: dict[str, list[float]] = {request_id: [] for request_id in num_tokens}
    for step in steps:
        for request_id in step.request_ids:
            got = times.get(request_id)
            if got is not None and len(got) < num_tokens[request_id]:
                got.append(step.read_back)
    return times
