"""Ctrl-C and errors in any part of a step, several threads, a GPU that fails: nothing is lost or left behind.

Greedy tokens are compared with the Transformers library in tests/e2e; here they are compared with the engine's own
for one prompt alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLMEngine
from mini_infer.exceptions import EngineBusyError, EngineClosedError, EngineDeadError, describe
from mini_infer.outputs import GenerateOutput
from mini_infer.runner import StepHandle
from mini_infer.step import SchedulerOutputs
from tests.engine.driving import (
    MESSAGES,
    PROMPT,
    assert_idle,
    fetch,
    greedy,
    make_engine,
    prompts_of,
    runner_of,
    scheduler_of,
)

# Interrupts


def test_an_interrupted_generate(
    engine: LLMEngine, alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two steps: none of its requests is left, finished or not, and the engine works on."""
    step = LLMEngine.step
    calls = 0

    def interrupted(self: LLMEngine) -> list[GenerateOutput]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return step(self)

    other = engine.add_request(PROMPT, sampling_params=greedy(30))
    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts_of(20), sampling_params=[greedy(2 + i) for i in range(20)])
    assert engine.stats().num_waiting + engine.stats().num_running + engine.stats().num_prefilling == 1
    assert not engine._processor._outputs
    assert fetch(engine, other).token_ids == alone(PROMPT, 30)


@pytest.fixture(scope="module", params=[1, 3])
def broken_engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLMEngine]:
    """An engine whose steps are broken off again and again."""
    with make_engine(folder, steps_in_flight=request.param, block_size=4, max_prefill_tokens=32) as engine:
        yield engine


def break_off(
    monkeypatch: pytest.MonkeyPatch, engine: LLMEngine, place: str, error: BaseException, *, call: int, after: bool
) -> None:
    """The ``call``-th call of a method that every step makes, or every end, raises before or after it has run."""
    owner: object = StepHandle
    for part in (engine._processor, scheduler_of(engine), runner_of(engine)):
        owner = part if hasattr(part, place) else owner
    method = getattr(owner, place)
    calls = 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise error
        result = method(*arguments)
        if calls == call:
            raise error
        return result

    monkeypatch.setattr(owner, place, broken)


STEP = ["schedule", "prepare", "execute", "result", "update"]
"""What a step consists of: an error there ends its requests."""
OUTPUT = ["advance", "end"]
"""What follows: an error there belongs to no request."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("fire")], ids=repr)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", [*STEP, *OUTPUT])
def test_a_step_that_is_broken_off(
    broken_engine: LLMEngine,
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    after: bool,
    error: BaseException,
) -> None:
    """By Ctrl-C or an error in any of its parts, whoever runs it: that is what the caller sees, nothing is left of what
    they asked for, and other people's requests are right, or end with the error rather than never."""
    engine = broken_engine
    raises = isinstance(error, KeyboardInterrupt) or place in OUTPUT
    message = describe(error)
    lengths = [2, 3, 3, 9]
    prompts = prompts_of(4, seed=19)

    def check(output: GenerateOutput, expected: list[int]) -> None:
        if output.finish_reason == "error":
            assert output.error == message
            assert output.token_ids == expected[: len(output.token_ids)]
        else:
            assert (output.finish_reason, output.token_ids) == ("length", expected)

    def generate() -> None:
        params = [greedy(length) for length in lengths]
        for output, prompt, length in zip(
            engine.generate(prompts, sampling_params=params), prompts, lengths, strict=True
        ):
            check(output, alone(prompt, length))

    def stream() -> None:
        *_, last = engine.stream(prompts[0], sampling_params=greedy(6))
        assert last.output is not None
        check(last.output, alone(prompts[0], 6))

    def poll() -> None:
        """The requests are not the caller's alone: an interrupted call loses none of them."""
        ids = [
            engine.add_request(prompt, sampling_params=greedy(length))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        broken = None
        while engine.has_unfinished_requests:
            try:
                engine.step()
            except (KeyboardInterrupt, RuntimeError) as caught:
                assert broken is None
                broken = caught
        for request_id, prompt, length in zip(ids, prompts, lengths, strict=True):
            output = engine.get_output(request_id)
            assert output is not None
            check(output, alone(prompt, length))
        if broken is not None:
            raise broken

    for use in (generate, stream, poll):
        for call in (1, 2, 4):
            other = engine.add_request(PROMPT, sampling_params=greedy(9))
            engine.step()
            with monkeypatch.context() as patch:
                break_off(patch, engine, place, error, call=call, after=after)
                try:
                    use()
                except type(error) as caught:
                    assert caught is error and raises
                    assert scheduler_of(engine).num_unfinished <= 1
                else:
                    assert not raises or (place == "end" and call > 1)  # there are not as many ends
            check(fetch(engine, other, most_calls=100), alone(PROMPT, 9))
            assert_idle(engine)
            assert engine.generate([PROMPT], sampling_params=greedy(9))[0].token_ids == alone(PROMPT, 9)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("fire")], ids=repr)
@pytest.mark.parametrize("use", ["generate", "stream"])
def test_a_tokenizer_that_fails(
    engine: LLMEngine,
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    error: BaseException,
) -> None:
    """Its request ends with the error, nobody else's; an interrupt inside it goes to the caller."""
    other = engine.add_request(PROMPT, sampling_params=greedy(30))
    decode, calls = engine.tokenizer.decode, 0  # type: ignore[union-attr]

    def failing(*arguments: Any, **options: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return decode(*arguments, **options)

    def run() -> list[GenerateOutput]:
        if use == "generate":
            return engine.generate(prompts_of(2), sampling_params=greedy(9, stop="not there"))
        *_, last = engine.stream(prompts_of(1)[0], sampling_params=greedy(9))
        assert last.output is not None
        return [last.output]

    with monkeypatch.context() as patch:
        patch.setattr(engine.tokenizer, "decode", failing)
        if isinstance(error, Exception):
            outputs = run()
            assert [output.error for output in outputs].count("RuntimeError: fire") == 1
            assert {output.finish_reason for output in outputs} <= {"error", "length"}
        else:
            with pytest.raises(KeyboardInterrupt):
                run()
            assert scheduler_of(engine).num_unfinished == 1
    assert fetch(engine, other).token_ids == alone(PROMPT, 30)


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_an_interrupt_while_waiting_for_tokens(
    engine_with: Callable[..., LLMEngine],
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    steps_in_flight: int,
) -> None:
    """Nothing is lost: the tokens are read at the next step."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    inside = engine.add_request(PROMPT, sampling_params=greedy(30))
    for _ in range(5):
        engine.step()
    result = StepHandle.result
    with monkeypatch.context() as patch:
        patch.setattr(StepHandle, "result", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts_of(3), sampling_params=greedy(20))
    assert StepHandle.result is result
    assert fetch(engine, inside).token_ids == alone(PROMPT, 30)


# Threads


def test_one_thread_at_a_time(
    engine: LLMEngine, alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call from another thread while one is under way is refused, and neither thread's requests take harm."""
    prompts = prompts_of(4, seed=23)
    stream = engine.stream(prompts[3], max_tokens=4, sampling_params=greedy())
    next(stream)
    refused: list[str] = []
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: engine.generate([prompts[0]]),
        "chat": lambda: engine.chat(MESSAGES),
        "add_request": lambda: engine.add_request(prompts[0]),
        "get_output": lambda: engine.get_output("request-0"),
        "abort": lambda: engine.abort("request-0"),
        "step": engine.step,
        "stream": lambda: next(engine.stream(prompts[0])),
        "next": lambda: next(stream),
        "shutdown": engine.shutdown,
    }

    def call_all() -> None:
        for name, call in calls.items():
            try:
                call()
            except EngineBusyError:
                refused.append(name)

    schedule = scheduler_of(engine).schedule

    def in_the_middle() -> SchedulerOutputs:
        if not refused:
            other = threading.Thread(target=call_all)
            other.start()
            other.join()
        return schedule()

    with monkeypatch.context() as patch:
        patch.setattr(scheduler_of(engine), "schedule", in_the_middle)
        outputs = engine.generate(prompts[:2], max_tokens=5, temperature=0.0)
    assert refused == list(calls)
    assert [output.token_ids for output in outputs] == [alone(prompt, 5) for prompt in prompts[:2]]
    stream.close()
    assert_idle(engine)


def test_threads_in_turn(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """One after the other any of them may; a stream that another thread drops goes with the next step."""
    prompt = prompts_of(1, seed=24)[0]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for pool in (one, two):
            output = pool.submit(engine.generate, [prompt], max_tokens=4, temperature=0.0).result()[0]
            assert output.token_ids == alone(prompt, 4)
        streams = [engine.stream(prompt, max_tokens=50, sampling_params=greedy())]
        next(streams[0])
        with engine._driving():
            one.submit(streams.clear).result()
        assert engine.stats().num_running == 1
    engine.step()
    assert_idle(engine)


def test_a_gpu_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs say so, later calls as well; leaving the block does not hide the user's own exception."""
    engine = make_engine(folder)

    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(runner_of(engine), "execute", fail)
    monkeypatch.setattr(runner_of(engine), "synchronize", fail)
    outputs = engine.generate(prompts_of(9, seed=25), max_tokens=3)
    assert {output.error for output in outputs} == {"RuntimeError: CUDA error: unspecified launch failure"}
    calls: list[Callable[[], object]] = [
        lambda: engine.generate([PROMPT]),
        lambda: engine.chat(MESSAGES),
        lambda: engine.add_request(PROMPT),
        lambda: next(engine.stream(PROMPT)),
    ]
    for call in calls:
        with pytest.raises(EngineDeadError, match=r"unspecified launch failure.*start a new process"):
            call()
    assert not engine.has_unfinished_requests
    with pytest.raises(ZeroDivisionError), engine:
        raise ZeroDivisionError
    with pytest.raises(EngineClosedError):
        engine.step()
