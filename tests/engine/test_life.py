"""What the engine tells of itself, and its end."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mini_infer import LLMEngine
from mini_infer.buckets import BucketUse
from mini_infer.exceptions import ConfigError, EngineClosedError
from mini_infer.outputs import StreamIncrement
from mini_infer.request import Request
from mini_infer.runner import StepHandle
from mini_infer.step import SchedulerOutputs
from tests.engine.driving import MESSAGES, PROMPT, assert_idle, fetch, greedy, make_engine, prompts_of

# Stats


def test_stats(engine_with: Callable[..., LLMEngine]) -> None:
    """Every count of a small run, by hand."""
    engine = engine_with(
        decode_buckets=[4], prefill_buckets=[16, 64], max_prefill_tokens=64, enable_prefix_caching=False
    )
    fresh = engine.stats()
    assert (fresh.num_finished, fresh.decode_steps, fresh.decode_padding, fresh.prefill_padding) == (0, 0, 0.0, 0.0)
    ids = [engine.add_request([10 * i + j for j in range(1, 6)], sampling_params=greedy(4)) for i in range(1, 4)]
    assert engine.stats().num_waiting == 3
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_prefilling) == (3, 0, 0)
    assert (stats.kv_blocks_used, stats.kv_blocks_total, stats.kv_blocks_cached) == (3, 8 * 12, 0)
    for request_id in ids:
        fetch(engine, request_id)
    stats = engine.stats()
    assert (stats.num_finished, stats.num_running, stats.kv_blocks_used) == (3, 0, 0)
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.output_tokens) == (15, 0, 12)
    assert (stats.prefill_steps, stats.decode_steps, stats.off_graph_steps) == (1, 3, 0)
    assert stats.prefill_buckets == {16: BucketUse(1, 15, 1, pytest.approx(1.0), 16.0)}
    assert stats.decode_buckets == {4: BucketUse(3, 9, 3, pytest.approx(3.0), 12.0)}
    assert (stats.prefill_padding, stats.decode_padding) == (1 / 16, 0.25)
    assert stats.preemptions == {"swap": 0, "recompute": 0}
    assert (stats.decode_costs, stats.context_ms_per_token, stats.costs_measured) == ({4: 4.0, 8: 8.0}, 0.0, False)
    assert stats.memory.num_gpu_blocks == 96
    assert stats.graphs == ()
    assert sum(stats.startup.phases.values()) == pytest.approx(stats.startup.total)
    assert fresh.num_finished == 0  # a snapshot stays as it was


def test_cached_prompt_tokens(engine_with: Callable[..., LLMEngine]) -> None:
    """The second time, all full blocks but the last token's come from the cache; computed and cached add up."""
    engine = engine_with()
    prompt = prompts_of(1, seed=17)[0][:1] * 50
    first, second = (engine.generate([prompt], max_tokens=1, temperature=0.0)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (50 + 2, 48)
    assert stats.kv_blocks_cached == 3
    assert first.token_ids == second.token_ids


# The end


def test_shutdown(folder: Path) -> None:
    """Drops everything, may be called again, and every further call says so."""
    engine = make_engine(folder)
    request_id = engine.add_request(PROMPT, max_tokens=50)
    stream = engine.stream(PROMPT, max_tokens=50)
    next(stream)
    engine.shutdown()
    engine.shutdown()
    calls: list[Callable[[], object]] = [
        lambda: engine.generate([PROMPT]),
        lambda: engine.stream(PROMPT),
        lambda: engine.chat(MESSAGES),
        lambda: engine.stream_chat(MESSAGES),
        lambda: engine.add_request(PROMPT),
        lambda: engine.get_output(request_id),
        lambda: engine.abort(request_id),
        engine.step,
        engine.stats,
        engine.__enter__,
        lambda: engine.tokenizer,
        lambda: engine.max_model_len,
        lambda: engine.has_chat_template,
        lambda: engine.has_unfinished_requests,
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="shut down"):
            call()


def test_what_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"takes an EngineConfig\(model=\.\.\.\), got 'some/model'"):
        LLMEngine("some/model")  # type: ignore[arg-type]


def test_context_manager(folder: Path) -> None:
    """Closed at the end, also by an exception, which goes through; a stream left open does not mind."""
    with make_engine(folder) as engine:
        stream: Iterator[StreamIncrement] = engine.stream(PROMPT, max_tokens=50)
        next(stream)
    del stream
    gc.collect()
    with pytest.raises(EngineClosedError):
        engine.stats()
    with pytest.raises(ZeroDivisionError), make_engine(folder) as engine:
        raise ZeroDivisionError
    with pytest.raises(EngineClosedError):
        engine.stats()


def test_nothing_is_kept_of_a_request(engine: LLMEngine) -> None:
    """After hundreds of requests, aborts and streams no record of one is alive anywhere."""

    def records() -> list[object]:
        gc.collect()
        return [value for value in gc.get_objects() if type(value) in (Request, SchedulerOutputs, StepHandle)]

    others = records()  # of other tests, which they keep on purpose
    known = set(map(id, others))
    draw = random.Random(2)
    for _ in range(60):
        ids = [engine.add_request(prompt, max_tokens=draw.randint(1, 3)) for prompt in prompts_of(5, longest=5)]
        engine.abort(ids.pop())
        for request_id in ids:
            fetch(engine, request_id)
    for _ in zip(range(2), engine.stream(PROMPT, max_tokens=9), strict=False):
        pass
    engine.generate([PROMPT] * 3, max_tokens=2)
    assert_idle(engine)
    assert not [record for record in records() if id(record) not in known]
