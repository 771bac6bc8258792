"""Steps that fail, and models that give NaN: whose requests end with it, and whose go on.

Greedy tokens are compared with the Transformers library in tests/e2e; here they are compared with the engine's own
for one prompt alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mini_infer import LLMEngine
from mini_infer.outputs import GenerateOutput
from mini_infer.runner import StepHandle
from mini_infer.step import ClearRow, SampledTokens, SchedulerOutputs, StepKind
from tests.engine.driving import PROMPT, fetch, greedy, prompts_of, runner_of

# Failing steps


class Failing:
    """A method that raises once, at the first step that ``condition`` picks."""

    def __init__(self, method: Callable[[SchedulerOutputs], Any], error: BaseException, condition: Any) -> None:
        self.method, self.error, self.condition = method, error, condition
        self.failed: SchedulerOutputs | None = None

    def __call__(self, outputs: SchedulerOutputs) -> Any:
        if self.failed is None and self.condition(outputs):
            self.failed = outputs
            raise self.error
        return self.method(outputs)


def make_fail(
    monkeypatch: pytest.MonkeyPatch,
    engine: LLMEngine,
    name: str,
    condition: Callable[[SchedulerOutputs], bool],
    error: BaseException | None = None,
) -> Failing:
    failing = Failing(getattr(runner_of(engine), name), error or RuntimeError("the device is on fire"), condition)
    monkeypatch.setattr(runner_of(engine), name, failing)
    return failing


def run_all(engine: LLMEngine, prompts: list[list[int]], lengths: list[int]) -> list[GenerateOutput]:
    ids = [
        engine.add_request(prompt, sampling_params=greedy(length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return [fetch(engine, request_id) for request_id in ids]


def check_survivors(
    outputs: list[GenerateOutput], prompts: list[list[int]], lengths: list[int], alone: Callable[..., list[int]]
) -> None:
    """Every request either failed with the step's error, with a right beginning, or is right to the end."""
    for output, prompt, length in zip(outputs, prompts, lengths, strict=True):
        expected = alone(prompt, length)
        assert output.token_ids == expected[: len(output.token_ids)]
        if output.finish_reason == "error":
            assert output.error == "RuntimeError: the device is on fire"
        else:
            assert output.finish_reason == "length"
            assert output.error is None
            assert output.token_ids == expected
    reasons = {output.finish_reason for output in outputs}
    assert reasons == {"error", "length"}


@pytest.mark.parametrize("steps_in_flight", [1, 3])
@pytest.mark.parametrize("kind", [StepKind.PREFILL, StepKind.DECODE])
def test_a_step_that_cannot_be_launched(
    engine_with: Callable[..., LLMEngine],
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    kind: StepKind,
    steps_in_flight: int,
) -> None:
    """Its requests end with "error" and its message; the others go on, and so does the engine."""
    engine = engine_with(steps_in_flight=steps_in_flight, max_num_seqs=3, max_prefill_tokens=32, block_size=4)
    failing = make_fail(monkeypatch, engine, "execute", lambda outputs: outputs.step > 5 and outputs.kind is kind)
    prompts, lengths = prompts_of(10, seed=12), [3 + (5 * i) % 14 for i in range(10)]
    outputs = run_all(engine, prompts, lengths)
    assert failing.failed is not None
    check_survivors(outputs, prompts, lengths, alone)
    assert {o.request_id for o in outputs if o.finish_reason == "error"} == set(failing.failed.request_ids)
    assert engine.stats().num_finished == 10


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_a_step_whose_tokens_do_not_come(
    engine_with: Callable[..., LLMEngine],
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    steps_in_flight: int,
) -> None:
    """The same when the error shows only when the tokens are read back, steps later."""
    engine = engine_with(steps_in_flight=steps_in_flight, max_num_seqs=3, block_size=4)
    result = StepHandle.result
    calls = 0

    def fail_once(handle: StepHandle) -> SampledTokens:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise RuntimeError("the device is on fire")
        return result(handle)

    monkeypatch.setattr(StepHandle, "result", fail_once)
    prompts, lengths = prompts_of(10, seed=13), [3 + (5 * i) % 14 for i in range(10)]
    outputs = run_all(engine, prompts, lengths)
    monkeypatch.undo()
    check_survivors(outputs, prompts, lengths, alone)


def test_a_swap_that_fails(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever's blocks were to be copied must not go on from what lies in the CPU blocks instead."""
    engine = engine_with(
        block_size=4, num_gpu_blocks=16, num_cpu_blocks=40, preemption="swap", max_model_len=64, prefill_share=1.0,
        enable_prefix_caching=False,
    )  # fmt: skip
    failing = make_fail(monkeypatch, engine, "prepare", lambda outputs: outputs.step > 9 and bool(outputs.swap_out))
    prompts, lengths = prompts_of(12, seed=14, longest=10), [5 + (7 * i) % 22 for i in range(12)]
    outputs = run_all(engine, prompts, lengths)
    assert failing.failed is not None
    check_survivors(outputs, prompts, lengths, alone)
    assert engine.stats().preemptions["swap"] > 1


def test_edits_that_are_lost(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a request that ended must not go on decoding, into blocks that others have by then."""
    engine = engine_with(block_size=4, decode_buckets=[8], enable_prefix_caching=False)
    failing = make_fail(
        monkeypatch, engine, "prepare", lambda outputs: any(isinstance(edit, ClearRow) for edit in outputs.edits)
    )
    first = run_all(engine, prompts_of(3, seed=15), [3, 20, 20])
    assert failing.failed is not None
    assert [output.finish_reason for output in first] == ["length", "error", "error"]
    later = prompts_of(2, seed=18)
    ids = [engine.add_request(prompt, sampling_params=greedy(30)) for prompt in later]
    for _ in range(5):
        engine.step()
    rows = runner_of(engine)._state.rows(8)
    assert rows.active.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert not rows.block_tables[2:].any()
    for request_id, prompt in zip(ids, later, strict=True):
        assert fetch(engine, request_id).token_ids == alone(prompt, 30)


# NaN


def poison(engine: LLMEngine, token_id: int) -> None:
    """The embedding of one token is NaN from now on: whoever reads it has no distribution."""
    runner_of(engine)._model.params.embedding[token_id] = float("nan")


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_nan_ends_its_request_only(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], steps_in_flight: int
) -> None:
    """In a batch, packed into one prefill step: the neighbours' tokens are as if it had not been there."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    prompts = [prompt for prompt in prompts_of(9, seed=16) if 5 not in prompt and 5 not in alone(prompt, 10)]
    assert len(prompts) > 4
    poison(engine, 5)
    prompts.insert(2, [9, 5, 9])
    outputs = engine.generate(prompts, sampling_params=greedy(10))
    bad = outputs.pop(2)
    assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", [], "")
    assert bad.error is not None
    assert "NaN" in bad.error
    assert math.isfinite(bad.cumulative_logprob)
    del prompts[2]
    assert [output.token_ids for output in outputs] == [alone(prompt, 10) for prompt in prompts]
    assert all(output.error is None for output in outputs)


def test_nan_in_the_middle_of_decoding(engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]) -> None:
    """What was generated before is in the output."""
    expected = alone(PROMPT, 12)
    index = next(i for i in range(4, 11) if expected[i] not in [*expected[:i], *PROMPT])
    engine = engine_with()
    poison(engine, expected[index])
    output = engine.generate([PROMPT], sampling_params=greedy(12))[0]
    assert output.finish_reason == "error"
    assert output.token_ids == expected[: index + 1]
    assert output.text == engine.tokenizer.decode(expected[: index + 1])  # type: ignore[union-attr]


def test_nan_does_not_live_on_in_its_blocks(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]
) -> None:
    """A later sequence that gets the same blocks, and fills only part of them, is not affected."""
    engine = engine_with(num_gpu_blocks=12, enable_prefix_caching=False, max_model_len=192)
    poison(engine, 5)
    prompts = [prompt for prompt in ([9, 8], [7], [30, 40, 50]) if 5 not in alone(prompt, 20)]
    assert prompts
    for prompt in prompts:
        assert engine.generate([[9, 5, 7] * 60], sampling_params=greedy(1))[0].finish_reason == "error"
        output = engine.generate([prompt], sampling_params=greedy(20))[0]
        assert (output.error, output.token_ids) == (None, alone(prompt, 20))


def test_nan_does_not_live_on_in_the_prefix_cache(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]
) -> None:
    """A prompt that begins as a failed one did, before what broke it, is computed anew."""
    engine = engine_with(block_size=4, max_prefill_tokens=24)
    poison(engine, 5)
    healthy = [30, 40, 50, 60] * 4
    assert 5 not in alone(healthy, 10)
    for broken in ([*healthy, 5, 9], [*healthy, *healthy[:4], 5, 9, *healthy * 2]):  # in one chunk, and in several
        assert engine.generate([broken], sampling_params=greedy(3))[0].finish_reason == "error"
        output = engine.generate([healthy], sampling_params=greedy(10))[0]
        assert (output.error, output.token_ids) == (None, alone(healthy, 10))
