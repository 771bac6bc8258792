"""What the tests of the engine drive it with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from mini_infer import LLMEngine, SamplingParams
from mini_infer.outputs import GenerateOutput
from mini_infer.runner import ModelRunner
from mini_infer.scheduler import Scheduler
from tests.tiny_engines import tiny_config

PROMPT = [9, 200, 31, 7, 77]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def make_engine(folder: Path, **options: Any) -> LLMEngine:
    return LLMEngine(tiny_config(folder, **{"max_num_seqs": 8, "max_model_len": 192, **options}))


def runner_of(engine: LLMEngine) -> ModelRunner:
    return engine._open().runner


def scheduler_of(engine: LLMEngine) -> Scheduler:
    return engine._open().scheduler


def assert_idle(engine: LLMEngine) -> None:
    """No request, no output, no block is left anywhere."""
    assert engine._loop is not None
    while engine._loop._in_flight:  # surplus steps of sequences that ended
        engine.step()
    stats, scheduler = engine.stats(), scheduler_of(engine)
    assert (stats.num_running, stats.num_prefilling, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0, 0)
    assert not engine.has_unfinished_requests
    assert scheduler.block_manager.num_free_cpu_blocks == scheduler.block_manager.num_cpu_blocks
    scheduler.block_manager.check_integrity()
    for container in (
        engine._loop._left,
        engine._processor._tracked,
        engine._processor._watched,
        engine._processor._outputs,
        scheduler._requests,
        scheduler._places.queue,
        scheduler._places.prefilling,
        scheduler.block_manager._sequences,
    ):
        assert not container


def greedy(max_tokens: int = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **changes})


def prompts_of(count: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 320) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def fetch(engine: LLMEngine, request_id: str, most_calls: int = 2000) -> GenerateOutput:
    """Poll for one output, within a bound."""
    for _ in range(most_calls):
        output = engine.get_output(request_id)
        if output is not None:
            return output
    raise AssertionError(f"{request_id} did not finish within {most_calls} calls")


def encode(engine: LLMEngine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode(text)
