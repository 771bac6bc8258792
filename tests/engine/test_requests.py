"""Requests one by one: queued, polled for, taken back in every state.

Greedy tokens are compared with the Transformers library in tests/e2e; here they are compared with the engine's own
for one prompt alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mini_infer import LLMEngine
from mini_infer.exceptions import InvalidRequestError
from mini_infer.outputs import GenerateOutput
from mini_infer.request import RequestStatus
from mini_infer.step import SchedulerOutputs
from tests.engine.driving import PROMPT, fetch, greedy, prompts_of, runner_of, scheduler_of

# Polling


def test_polling_alone_is_enough(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """The contract's loop: add_request, then get_output until all are there, never step()."""
    prompts = prompts_of(20, seed=3)
    ids = {engine.add_request(prompt, sampling_params=greedy(8)): prompt for prompt in prompts}
    assert len(ids) == 20
    found: dict[str, GenerateOutput] = {}
    calls = 0
    waiting = list(ids)
    while waiting:
        for request_id in waiting[:]:
            output = engine.get_output(request_id)
            calls += 1
            if output:
                found[request_id] = output
                waiting.remove(request_id)
    assert calls < 400
    for request_id, prompt in ids.items():
        assert found[request_id].request_id == request_id
        assert found[request_id].token_ids == alone(prompt, 8)


def test_a_call_is_one_step(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """get_output of an unfinished request runs exactly one step, of a finished one none."""
    steps: list[SchedulerOutputs] = []
    execute = runner_of(engine).execute
    monkeypatch.setattr(runner_of(engine), "execute", lambda outputs: (steps.append(outputs), execute(outputs))[1])
    first, second = (engine.add_request(PROMPT, sampling_params=greedy(4)) for _ in range(2))
    for count in range(1, 4):
        assert engine.get_output(first) is None
        assert len(steps) == count
    assert engine.get_output(first) is not None
    assert len(steps) == 4
    assert engine.get_output(second) is not None  # finished in the same step
    assert len(steps) == 4


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_polling_any_one_moves_all(engine_with: Callable[..., LLMEngine], steps_in_flight: int) -> None:
    """Whoever polls the last request drives the others to their ends too."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    ids = [engine.add_request(prompt, sampling_params=greedy(5)) for prompt in prompts_of(12)]
    fetch(engine, ids[-1], most_calls=60)
    for request_id in ids[:-1]:
        assert engine.get_output(request_id) is not None


def test_get_output_of_no_request(engine: LLMEngine) -> None:
    """Unknown, or fetched already: an error, so that a polling loop cannot wait for ever."""
    for request_id in ("nonsense", "", "request-99999999"):
        with pytest.raises(InvalidRequestError, match="no request"):
            engine.get_output(request_id)
    for wrong in (None, 7, [], {}):
        for method in (engine.get_output, engine.abort):
            with pytest.raises(InvalidRequestError, match="a request's id is a string, got "):
                method(wrong)  # type: ignore[operator]
    request_id = engine.add_request(PROMPT, max_tokens=1)
    fetch(engine, request_id)
    with pytest.raises(InvalidRequestError, match=f"{request_id}.*fetched already"):
        engine.get_output(request_id)


def test_an_empty_text_is_an_output(engine: LLMEngine, script: Callable[..., None]) -> None:
    """`if output:` means "it is ready", even when nothing was said."""
    script(engine, [1])
    output = fetch(engine, engine.add_request(PROMPT))
    assert output.text == ""
    assert bool(output)


def test_step_returns_what_ended(engine: LLMEngine) -> None:
    """For those who drive the engine themselves; get_output still gives it, once."""
    request_id = engine.add_request(PROMPT, sampling_params=greedy(3))
    assert engine.has_unfinished_requests
    assert [engine.step(), engine.step()] == [[], []]
    (output,) = engine.step()
    assert output.request_id == request_id
    assert not engine.has_unfinished_requests
    assert engine.step() == []
    assert engine.get_output(request_id) is output


def test_ids_are_unique(engine: LLMEngine) -> None:
    """Over generate, stream and add_request, and after ends."""
    ids = [output.request_id for output in engine.generate([PROMPT] * 3, max_tokens=1)]
    ids += [[*engine.stream(PROMPT, max_tokens=1)][-1].request_id]
    ids += [engine.add_request(PROMPT, max_tokens=1) for _ in range(3)]
    for request_id in ids[-3:]:
        fetch(engine, request_id)
    assert len(set(ids)) == 7
    assert all(isinstance(request_id, str) for request_id in ids)


def test_generate_beside_queued_requests(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """generate leaves other people's requests and outputs alone."""
    prompts = prompts_of(3, seed=5)
    short = engine.add_request(prompts[0], sampling_params=greedy(2))
    long = engine.add_request(prompts[1], sampling_params=greedy(40))
    output = engine.generate([prompts[2]], sampling_params=greedy(10))[0]
    assert output.token_ids == alone(prompts[2], 10)
    for request_id, prompt, count in ((short, prompts[0], 2), (long, prompts[1], 40)):
        assert fetch(engine, request_id).token_ids == alone(prompt, count)


# Abort


def status(engine: LLMEngine, request_id: str) -> RequestStatus:
    return scheduler_of(engine)._requests[request_id].status


def check_partial(engine: LLMEngine, output: GenerateOutput, expected: list[int]) -> None:
    """What an aborted request had, to the token; and asking again is an error."""
    assert output.finish_reason == "abort"
    assert output.token_ids == expected
    assert output.text == engine.tokenizer.decode(expected)  # type: ignore[union-attr]
    with pytest.raises(InvalidRequestError, match="no request"):
        engine.abort(output.request_id)
    with pytest.raises(InvalidRequestError, match="no request"):
        engine.get_output(output.request_id)


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_abort_in_every_state(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], steps_in_flight: int
) -> None:
    """Waiting, prefilling, running, draining, finished: the partial output, no block left, others unharmed."""
    engine = engine_with(steps_in_flight=steps_in_flight, max_prefill_tokens=16, max_num_seqs=3)
    other_prompt = prompts_of(1, seed=9)[0]
    other = engine.add_request(other_prompt, sampling_params=greedy(60))
    long_prompt = PROMPT * 10

    waiting = engine.add_request(PROMPT)
    assert status(engine, waiting) is RequestStatus.WAITING
    check_partial(engine, engine.abort(waiting), [])

    prefilling = engine.add_request(long_prompt)
    while status(engine, prefilling) is not RequestStatus.PREFILLING:
        engine.step()
    check_partial(engine, engine.abort(prefilling), [])

    running = engine.add_request(PROMPT, sampling_params=greedy(50))
    while len(scheduler_of(engine)._requests[running].output_token_ids) < 4:
        engine.step()
    assert status(engine, running) is RequestStatus.RUNNING
    check_partial(engine, engine.abort(running), alone(PROMPT, 4))

    if steps_in_flight > 1:
        draining = engine.add_request(PROMPT, sampling_params=greedy(2))
        while status(engine, draining) is not RequestStatus.DRAINING:
            engine.step()
        output = engine.abort(draining)
        check_partial(engine, output, alone(PROMPT, 2)[: len(output.token_ids)])

    finished = engine.add_request(PROMPT, sampling_params=greedy(2))
    while engine._processor.__contains__(finished):
        engine.step()
    output = engine.abort(finished)
    assert (output.finish_reason, output.token_ids) == ("length", alone(PROMPT, 2))
    with pytest.raises(InvalidRequestError):
        engine.abort(finished)

    assert fetch(engine, other).token_ids == alone(other_prompt, 60)


def test_abort_a_swapped_request(engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]) -> None:
    """Its CPU blocks come back too (`assert_idle` counts them)."""
    engine = engine_with(
        block_size=4, num_gpu_blocks=20, num_cpu_blocks=40, preemption="swap", max_model_len=64, prefill_share=1.0
    )
    prompts = prompts_of(4, seed=10, longest=12)
    ids = [engine.add_request(prompt, sampling_params=greedy(40)) for prompt in prompts]
    swapped: list[str] = []
    while not swapped:
        engine.step()
        swapped = [i for i in ids if i in engine._processor and status(engine, i) is RequestStatus.SWAPPED]
    victim = swapped[0]
    prompt = prompts[ids.index(victim)]
    partial = list(scheduler_of(engine)._requests[victim].output_token_ids)
    assert partial
    check_partial(engine, engine.abort(victim), alone(prompt, len(partial)))
    for request_id, prompt in zip(ids, prompts, strict=True):
        if request_id != victim:
            assert fetch(engine, request_id).token_ids == alone(prompt, 40)


def test_abort_of_no_request(engine: LLMEngine) -> None:
    for request_id in ("nonsense", ""):
        with pytest.raises(InvalidRequestError, match="no request"):
            engine.abort(request_id)


def test_abort_at_random(engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]) -> None:
    """With steps ahead, chunks, preemption and swapping: whoever is not aborted gets the right tokens, and whoever is
    gets a beginning of them."""
    draw = random.Random(0)
    for options in ({"preemption": "swap", "num_cpu_blocks": 30}, {"preemption": "recompute"}):
        engine = engine_with(
            steps_in_flight=3,
            block_size=4,
            num_gpu_blocks=24,
            max_model_len=64,
            max_prefill_tokens=16,
            prefill_share=1.0,
            **options,
        )
        prompts = prompts_of(40, seed=11, longest=20)
        lengths = [draw.randint(1, 30) for _ in prompts]
        ids = [
            engine.add_request(prompt, sampling_params=greedy(length))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        outputs: dict[str, GenerateOutput] = {}
        while len(outputs) < len(ids):
            left = [request_id for request_id in ids if request_id not in outputs]
            chosen = draw.choice(left)
            if draw.random() < 0.05:
                outputs[chosen] = engine.abort(chosen)
            elif (output := engine.get_output(chosen)) is not None:
                outputs[chosen] = output
        assert sum(engine.stats().preemptions.values()) > 0
        reasons = {"abort": 0, "length": 0}
        for request_id, prompt, length in zip(ids, prompts, lengths, strict=True):
            output = outputs[request_id]
            reasons[output.finish_reason] += 1
            expected = alone(prompt, length)
            assert output.token_ids == expected[: len(output.token_ids)]
            assert output.finish_reason == "abort" or output.token_ids == expected
        assert min(reasons.values()) > 3
