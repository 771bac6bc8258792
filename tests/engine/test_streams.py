"""Streams, and conversations.

Greedy tokens are compared with the Transformers library in tests/e2e; here they are compared with the engine's own
for one prompt alone.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLMEngine
from mini_infer.exceptions import InvalidRequestError
from tests.engine.driving import MESSAGES, PROMPT, assert_idle, encode, fetch, greedy, make_engine, prompts_of
from tests.tiny_tokenizers import CHAT_TEMPLATE, save_tiny_tokenizer

# Streams


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_stream(engine_with: Callable[..., LLMEngine], steps_in_flight: int) -> None:
    """Increments join to the output, texts and tokens; the last one, and only it, carries the output."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    for prompt in ("hello", PROMPT, prompts_of(1, seed=6)[0]):
        expected = engine.generate([prompt], sampling_params=greedy(30))[0]
        increments = [*engine.stream(prompt, sampling_params=greedy(30))]
        output = increments[-1].output
        assert output is not None
        assert [increment.finished for increment in increments] == [False] * (len(increments) - 1) + [True]
        assert "".join(increment.text for increment in increments) == output.text == expected.text
        joined = [token_id for increment in increments for token_id in increment.token_ids]
        assert joined == output.token_ids == expected.token_ids
        assert len({increment.request_id for increment in increments}) == 1
        assert len(increments) >= 25


def test_stream_of_characters(engine: LLMEngine, script: Callable[..., None]) -> None:
    """Characters of several tokens come whole; bytes that never become one come at the end, as in the output."""
    tokens = encode(engine, "né 你好 🎉!")
    broken = [*encode(engine, "ab"), encode(engine, "🎉")[0]]
    for script_tokens in (tokens, broken):
        script(engine, script_tokens)
        increments = [*engine.stream(PROMPT, sampling_params=greedy(len(script_tokens)))]
        assert not any("\ufffd" in increment.text for increment in increments[:-1])
        assert "".join(increment.text for increment in increments) == engine.tokenizer.decode(script_tokens)  # type: ignore[union-attr]


def test_leaving_a_stream(engine: LLMEngine) -> None:
    """By break, by an exception in the loop, by close(): the request is aborted and its blocks come back at once."""

    def leave_by_break() -> None:
        for _ in engine.stream(PROMPT, sampling_params=greedy(100)):
            break

    def leave_by_error() -> None:
        with pytest.raises(ZeroDivisionError):
            for _ in engine.stream(PROMPT, sampling_params=greedy(100)):
                raise ZeroDivisionError

    def leave_by_close() -> None:
        with closing(engine.stream(PROMPT, sampling_params=greedy(100))) as stream:  # type: ignore[type-var]
            next(stream)
            next(stream)
            assert engine.stats().num_running == 1

    for leave in (leave_by_break, leave_by_error, leave_by_close):
        leave()
        gc.collect()
        assert_idle(engine)


def test_a_stream_nobody_reads_queues_nothing(engine: LLMEngine) -> None:
    """Nothing is held for an iterator that is dropped before its first increment."""
    engine.stream(PROMPT, max_tokens=5)
    assert not engine.has_unfinished_requests


def test_a_stream_is_checked_at_the_call(engine: LLMEngine) -> None:
    """Not at the first increment, which may be read somewhere else."""
    for prompt in ([], "", [320], b"x", [1] * 500):
        with pytest.raises(InvalidRequestError):
            engine.stream(prompt)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        engine.stream(PROMPT, max_tokens=0)
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        engine.stream(PROMPT, sampling_params={"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="non-empty list of turns"):
        engine.stream_chat([])


def test_streams_side_by_side(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """Two streams read in turns, with a generate in between: each gets its own."""
    prompts = prompts_of(3, seed=8)
    streams = [engine.stream(prompt, sampling_params=greedy(20)) for prompt in prompts[:2]]
    tokens: list[list[int]] = [[], []]
    for turn in range(6):  # each turn takes two steps, and every step moves both
        for index, stream in enumerate(streams):
            tokens[index] += next(stream).token_ids
        if turn == 2:
            output = engine.generate([prompts[2]], sampling_params=greedy(4))[0]
            assert output.token_ids == alone(prompts[2], 4)
    for index, stream in enumerate(streams):
        for increment in stream:
            tokens[index] += increment.token_ids
        assert tokens[index] == alone(prompts[index], 20)


@pytest.mark.parametrize("way", ["abort", "get_output"])
def test_a_stream_whose_request_is_taken(engine: LLMEngine, way: str) -> None:
    """Aborted or fetched by its id, inside the loop: the stream ends."""
    seen = 0
    for increment in engine.stream(PROMPT, sampling_params=greedy(20)):
        seen += 1
        if way == "abort":
            assert engine.abort(increment.request_id).finish_reason == "abort"
        else:
            assert fetch(engine, increment.request_id).finish_reason == "length"
    assert seen == 1


# Chat


def test_chat_uses_the_template(engine: LLMEngine) -> None:
    """The prompt is the template's rendering, the same streamed or not."""
    assert engine.has_chat_template
    rendered = engine.tokenizer.apply_chat_template(MESSAGES)  # type: ignore[union-attr]
    assert engine.tokenizer.decode(rendered, skip_special_tokens=False) == (  # type: ignore[union-attr]
        "<s>system: be brief</s><s>user: hello</s><s>assistant: "
    )
    output = engine.chat(MESSAGES, 12, greedy(99))
    assert output.prompt_token_ids == rendered
    assert output.token_ids == engine.generate([rendered], sampling_params=greedy(12))[0].token_ids
    increments = [*engine.stream_chat(MESSAGES, 12, greedy(99))]
    assert increments[-1].output is not None
    assert increments[-1].output.prompt_token_ids == rendered
    assert "".join(increment.text for increment in increments) == output.text


@pytest.mark.parametrize(
    "messages", [[], "hi", {"role": "user", "content": "x"}, [{"role": "user"}], ["hi"], [{"role": 1, "content": "x"}],
                 [{"role": "user", "content": "half a pair: \ud83d"}], [{"role": "\ud83d", "content": "x"}], None]
)  # fmt: skip
def test_bad_messages(engine: LLMEngine, messages: Any) -> None:
    for method in (engine.chat, engine.stream_chat):
        with pytest.raises(InvalidRequestError):
            method(messages)


def test_no_chat_template(folder: Path, tmp_path: Path) -> None:
    """Refused with what to use instead; plain prompts work."""
    shutil.copytree(folder, tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model", chat_template=None)
    with make_engine(tmp_path / "model") as engine:
        assert not engine.has_chat_template
        for method in (engine.chat, engine.stream_chat):
            with pytest.raises(InvalidRequestError, match="no chat template: use generate or stream"):
                method(MESSAGES)
        assert engine.generate("hello", max_tokens=1)


def test_a_template_that_refuses(folder: Path, tmp_path: Path) -> None:
    """The model's own words are in the error."""
    shutil.copytree(folder, tmp_path / "model")
    save_tiny_tokenizer(
        tmp_path / "model", chat_template="{{ raise_exception('roles must alternate') }}" + CHAT_TEMPLATE
    )
    with make_engine(tmp_path / "model") as engine, pytest.raises(InvalidRequestError, match="roles must alternate"):
        engine.chat(MESSAGES)
