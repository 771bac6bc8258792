"""From tokens to outputs: text, stop strings, timings, increments."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mini_infer.output_processor import OutputProcessor
from mini_infer.output_table import OutputTable
from mini_infer.outputs import GenerateOutput
from mini_infer.request import FinishReason, Request, RequestStatus
from mini_infer.sampling import SamplingParams
from mini_infer.tokenizer import Tokenizer
from tests.hypothesis_profiles import PROPERTY
from tests.simulated_device import sampled_tokens
from tests.tiny_tokenizers import tiny_byte_level_tokenizer

TOKENIZER = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tiny_byte_level_tokenizer(), eos_token="</s>"))
EOS = 1


def request_of(request_id: str = "request-0", **params: Any) -> Request:
    """A request that was admitted."""
    sampling = SamplingParams(**{"max_tokens": 99, **params})
    stop_token_ids = frozenset({EOS, *sampling.stop_token_ids})
    request = Request(request_id, (5, 6), sampling, stop_token_ids=stop_token_ids, max_output_tokens=99)
    request.enter(OutputTable(1))
    return request


def append(request: Request, token_id: int) -> None:
    """A token is read back, as the scheduler takes it in."""
    table = request._table
    assert table is not None
    table.take_in(table.members(np.array([request.slot])), sampled_tokens([token_id], [-0.5]))


def feed(processor: OutputProcessor, request: Request, tokens: list[int], last: FinishReason | None = None) -> bool:
    """Tokens come one by one; ``last`` is the reason to end with the last one. True if stopped."""
    for index, token_id in enumerate(tokens):
        append(request, token_id)
        if last is not None and index + 1 == len(tokens):
            finish(request, last)
        processor.begin(request)
        if request in processor.advance():
            return True
    return False


def finish(request: Request, reason: FinishReason, error: str | None = None) -> None:
    request.leave()
    request.status, request.finish_reason, request.error = RequestStatus.FINISHED, reason, error


def run(tokens: list[int], last: FinishReason, *, streaming: bool, **params: Any) -> GenerateOutput:
    processor, request = OutputProcessor(TOKENIZER), request_of(**params)
    processor.track(request, streaming=streaming)
    assert request.request_id in processor
    if feed(processor, request, tokens, last) and not request.finished:
        finish(request, FinishReason.STOP)
    output = processor.end(request)
    assert request.request_id not in processor
    return output


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "text, stop, last, expected, reason",
    [
        ("plain text", (), FinishReason.LENGTH, "plain text", "length"),
        ("plain text", ("in t",), FinishReason.LENGTH, "pla", "stop"),
        ("plain text", ("text",), FinishReason.LENGTH, "plain ", "stop"),
        ("plain tex", ("text",), FinishReason.LENGTH, "plain tex", "length"),
        ("plain tex", ("text",), FinishReason.ABORT, "plain tex", "abort"),
        ("größer", ("ß",), FinishReason.LENGTH, "grö", "stop"),
    ],
)
def test_texts(
    streaming: bool, text: str, stop: tuple[str, ...], last: FinishReason, expected: str, reason: str
) -> None:
    """Cut before a stop string, whole otherwise, what was held back included; "stop" wins over "length"."""
    output = run(TOKENIZER.encode(text), last, streaming=streaming, stop=stop)
    assert (output.text, output.finish_reason) == (expected, reason)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_a_stop_token_is_no_text(streaming: bool, stop: tuple[str, ...]) -> None:
    """Neither the end token nor a stop token that has a text; it is among the tokens, though."""
    hello = TOKENIZER.encode("hello")
    (x,) = TOKENIZER.encode("X")
    for token_id, params in ((EOS, {}), (x, {"stop_token_ids": [x]})):
        output = run([*hello, token_id], FinishReason.STOP, streaming=streaming, stop=stop, **params)
        assert output.text == "hello"
        assert output.token_ids == [*hello, token_id]
    output = run([*hello, x], FinishReason.LENGTH, streaming=streaming, stop=stop)
    assert output.text == "helloX"


def test_a_stop_token_does_not_complete_a_stop_string() -> None:
    """Its text would, but it is no part of the text: what was held back comes out."""
    (x,) = TOKENIZER.encode("X")
    output = run([*TOKENIZER.encode("ab"), x], FinishReason.STOP, streaming=False, stop="bX", stop_token_ids=[x])
    assert (output.text, output.finish_reason) == ("ab", "stop")


def test_special_tokens_have_no_text() -> None:
    """Such as an end token that is ignored."""
    processor, request = OutputProcessor(TOKENIZER), request_of(ignore_eos=True)
    request.stop_token_ids = frozenset()
    processor.track(request, streaming=False)
    feed(processor, request, [*TOKENIZER.encode("a"), EOS, 0, *TOKENIZER.encode("b")], FinishReason.LENGTH)
    assert processor.end(request).text == "ab"


def test_advance_says_when_to_stop() -> None:
    """True exactly at the token that completes the stop string."""
    processor, request = OutputProcessor(TOKENIZER), request_of(stop="end")
    processor.track(request, streaming=False)
    tokens = TOKENIZER.encode("the end of it")
    stops = []
    for token_id in tokens:
        append(request, token_id)
        stops.append(processor.advance() == [request])
        if stops[-1]:
            break
    assert stops == [False] * (len(stops) - 1) + [True]
    assert "end" in TOKENIZER.decode(tokens[: len(stops)])
    assert "end" not in TOKENIZER.decode(tokens[: len(stops) - 1])


def test_an_error() -> None:
    """The error of a request goes into its output, with what it had."""
    processor, request = OutputProcessor(TOKENIZER), request_of()
    processor.track(request, streaming=True)
    feed(processor, request, TOKENIZER.encode("ab"))
    finish(request, FinishReason.ERROR, "it broke")
    assert processor.advance() == []  # as for NaN: no token came
    output = processor.end(request)
    assert (output.text, output.finish_reason, output.error) == ("ab", "error", "it broke")


def test_without_a_tokenizer() -> None:
    """Every text is empty; tokens are there."""
    for streaming in (False, True):
        processor, request = OutputProcessor(None), request_of()
        processor.track(request, streaming=streaming)
        feed(processor, request, [50, 51, 52], FinishReason.LENGTH)
        output = processor.end(request)
        assert (output.text, output.token_ids) == ("", [50, 51, 52])


def test_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued at track, first token at the first `begin` and not later, finished at end."""
    now = 10.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    processor, request = OutputProcessor(TOKENIZER), request_of()
    processor.track(request, streaming=False)
    now = 12.0
    feed(processor, request, [50])
    now = 15.0
    feed(processor, request, [51], FinishReason.LENGTH)
    now = 20.0
    timings = processor.end(request).timings
    assert (timings.queued, timings.first_token, timings.finished) == (10.0, 12.0, 20.0)
    assert (timings.ttft, timings.latency) == (2.0, 10.0)


def test_a_nan_is_no_first_token() -> None:
    """The first step of a request came back, but without a token of it."""
    processor, request = OutputProcessor(TOKENIZER), request_of()
    processor.track(request, streaming=False)
    finish(request, FinishReason.ERROR, "NaN")
    processor.begin(request)
    assert processor.end(request).timings.first_token is None


def test_only_texts_that_somebody_waits_for_are_followed() -> None:
    """Others are made in one go at the end, however many there are."""
    processor = OutputProcessor(TOKENIZER)
    plain, stopping, streamed = request_of("plain"), request_of("stopping", stop="b"), request_of("streamed")
    for request in (plain, stopping, streamed):
        processor.track(request, streaming=request is streamed)
    for token_id in TOKENIZER.encode("abc"):
        for request in (plain, stopping, streamed):
            append(request, token_id)
    assert list(processor._watched) == ["stopping", "streamed"]
    assert processor.advance() == [stopping] and processor.advance() == []
    for request in (plain, stopping, streamed):
        finish(request, FinishReason.LENGTH)
    assert [processor.end(request).text for request in (plain, stopping, streamed)] == ["abc", "a", "abc"]
    assert not processor._watched


def test_timings_without_a_token() -> None:
    """Aborted in the queue."""
    processor, request = OutputProcessor(TOKENIZER), request_of()
    processor.track(request, streaming=False)
    finish(request, FinishReason.ABORT)
    output = processor.end(request)
    assert output.timings.first_token is None
    assert output.timings.ttft is None
    assert output.timings.latency >= 0
    assert (output.text, output.token_ids) == ("", [])


def test_an_output_is_the_users_own() -> None:
    """Lists in it are copies: the user may change them."""
    processor, request = OutputProcessor(TOKENIZER), request_of()
    processor.track(request, streaming=False)
    feed(processor, request, [50, 51], FinishReason.LENGTH)
    output = processor.end(request)
    output.token_ids.append(52)
    assert request.output_token_ids == [50, 51]
    output.prompt_token_ids.append(3)
    assert request.prompt_token_ids == (5, 6)
    assert output.cumulative_logprob == -1.0


def test_outputs_are_truthy() -> None:
    """`if output:` means that it is ready."""
    output = run([EOS], FinishReason.STOP, streaming=False)
    assert output.text == ""
    assert output


@PROPERTY
@given(
    tokens=st.lists(st.integers(0, 319), min_size=1, max_size=40),
    stop=st.lists(st.text("abcdeth ", min_size=1, max_size=3), max_size=2),
    pauses=st.sets(st.integers(0, 40)),
)
def test_increments_join_to_the_output(tokens: list[int], stop: list[str], pauses: set[int]) -> None:
    """Whatever the tokens are and however many come between two increments: texts and token ids join, and the text
    is that of the same request when it is not streamed."""
    tokens = [token_id if token_id != EOS else 50 for token_id in tokens]
    expected = run(tokens, FinishReason.LENGTH, streaming=False, stop=stop)
    processor, request = OutputProcessor(TOKENIZER), request_of(stop=stop)
    processor.track(request, streaming=True)
    texts, token_ids = [], []
    for index, token_id in enumerate(tokens):
        stopped = feed(processor, request, [token_id], FinishReason.LENGTH if index + 1 == len(tokens) else None)
        if stopped:
            break
        if index in pauses:
            increment = processor.increment(request.request_id)
            texts.append(increment.text)
            token_ids += increment.token_ids
            assert increment.output is None
    if not request.finished:
        finish(request, FinishReason.STOP)
    output = processor.end(request)
    assert output.text.startswith("".join(texts))
    assert output.token_ids[: len(token_ids)] == token_ids
    assert (output.text, output.token_ids, output.finish_reason) == (
        expected.text,
        expected.token_ids,
        expected.finish_reason,
    )


def test_requests_do_not_mix() -> None:
    """Two streams fed in turns."""
    processor = OutputProcessor(TOKENIZER)
    requests = [request_of("a"), request_of("b")]
    texts = ["first one", "and the 2nd"]
    for request in requests:
        processor.track(request, streaming=True)
    tokens = [TOKENIZER.encode(text) for text in texts]
    for index in range(max(map(len, tokens))):
        for request, own in zip(requests, tokens, strict=True):
            feed(processor, request, own[index : index + 1])
    for request, text in zip(requests, texts, strict=True):
        assert processor.increment(request.request_id).text == text
        finish(request, FinishReason.LENGTH)
        assert processor.end(request).text == text
