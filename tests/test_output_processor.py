"""From tokens to outputs: text, stop strings, timings, increments."""

from __future__ import annotations

import time
from collections.abc import Sequence
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


def letters(text: str) -> list[int]:
    """Each letter as a token of its own."""
    return [token_id for letter in text for token_id in TOKENIZER.encode(letter)]


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
    assert processor.advance() == [stopping]
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


def test_an_output_is_kept_until_it_is_fetched() -> None:
    """Once; and nothing is left of a request that is dropped, at any time."""
    processor = OutputProcessor(TOKENIZER)
    requests = [request_of(name, stop="x") for name in ("a", "b", "c")]
    for request in requests:
        processor.track(request, streaming=True)
    assert processor.requests() == requests and processor.output("a") is None and processor.take("a") is None
    for request in requests[:2]:
        finish(request, FinishReason.ABORT)
        processor.end(request)
    assert processor.requests() == requests[2:]
    output = processor.output("a")
    assert output is not None and processor.take("a") is output and processor.take("a") is None
    for request_id in ("b", "c", "unknown"):
        processor.drop(request_id)
    assert not processor._tracked and not processor._watched and not processor._outputs
    processor.track(request_of("d", stop="x"), streaming=False)
    processor.clear()
    assert not processor._tracked and not processor._watched and not processor._outputs


class Breaking(Tokenizer):
    """Decoding raises from the call of this number on, ``times`` times."""

    def __init__(self, error: BaseException, call: int, times: int = 1) -> None:
        super().__init__(PreTrainedTokenizerFast(tokenizer_object=tiny_byte_level_tokenizer(), eos_token="</s>"))
        self.error, self.calls, self.failing = error, 0, range(call, call + times)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.calls += 1
        if self.calls in self.failing:
            raise self.error
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_a_tokenizer_that_fails_ends_its_request_only() -> None:
    """With the text that it had, and the error; others whose text is followed go on."""
    processor = OutputProcessor(Breaking(RuntimeError("no such text"), call=3))
    failing, other = request_of("failing"), request_of("other")
    for request in (failing, other):
        processor.track(request, streaming=True)
    over = []
    for token_id in letters("abc"):
        append(failing, token_id)
        append(other, token_id)
        over.append(processor.advance())
    assert over == [[], [failing], [failing]], "it is told of until it is ended"
    for request in (failing, other):
        finish(request, FinishReason.STOP if request is failing else FinishReason.LENGTH)
    output = processor.end(failing)
    assert (output.text, output.finish_reason, output.error) == ("a", "error", "RuntimeError: no such text")
    output = processor.end(other)
    assert (output.text, output.finish_reason, output.error) == ("abc", "length", None)


def test_a_tokenizer_that_fails_at_the_end() -> None:
    """There is an output all the same."""
    for streaming in (False, True):
        processor, request = OutputProcessor(Breaking(RuntimeError("no such text"), call=1, times=9)), request_of()
        processor.track(request, streaming=streaming)
        append(request, 50)
        finish(request, FinishReason.LENGTH)
        output = processor.end(request)
        assert (output.text, output.finish_reason, output.error) == ("", "error", "RuntimeError: no such text")
        assert output.token_ids == [50] and request.request_id not in processor


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupt_while_an_output_is_made(streaming: bool) -> None:
    """It can be made again: whole, or with the error if it came in the middle of an incremental text."""
    processor, request = OutputProcessor(Breaking(KeyboardInterrupt(), call=1)), request_of()
    processor.track(request, streaming=streaming)
    for token_id in letters("abc"):
        append(request, token_id)
    finish(request, FinishReason.LENGTH)
    with pytest.raises(KeyboardInterrupt):
        processor.end(request)
    assert request.request_id in processor
    output = processor.end(request)
    expected = ("", "error", "KeyboardInterrupt") if streaming else ("abc", "length", None)
    assert (output.text, output.finish_reason, output.error) == expected
    assert request.request_id not in processor and processor.take(request.request_id) is output


def test_an_interrupt_in_an_increment() -> None:
    """Others that were read before or are read after it lose and repeat nothing."""
    processor = OutputProcessor(Breaking(KeyboardInterrupt(), call=5))
    requests = [request_of("first", stop="b"), request_of("second"), request_of("third")]
    for request in requests:
        processor.track(request, streaming=True)
    a, b = letters("ab")
    for token_id, over in ((a, []), (b, None)):
        for request in requests:
            append(request, token_id)
        if over is None:
            with pytest.raises(KeyboardInterrupt):
                processor.advance()
        else:
            assert processor.advance() == over
    assert processor.advance() == requests[:2], "the first has come to its stop string, the second goes no further"
    assert [processor.increment(request.request_id).text for request in requests] == ["a", "a", "ab"]


def test_tokens_that_nobody_read_before_the_end() -> None:
    """The step in which they came broke off: the text has them, and ends at a stop string among them."""
    for stop, expected in (("", ("abcd", "length")), ("c", ("ab", "stop"))):
        processor, request = OutputProcessor(TOKENIZER), request_of(stop=stop or ())
        processor.track(request, streaming=True)
        for token_id in letters("abcd"):
            append(request, token_id)
        finish(request, FinishReason.LENGTH)
        output = processor.end(request)
        assert (output.text, output.finish_reason) == expected


def test_a_text_that_was_complete_before_an_error() -> None:
    """Its stop string was seen, then something else failed: it has all that was asked for."""
    processor, request = OutputProcessor(TOKENIZER), request_of(stop="b")
    processor.track(request, streaming=False)
    assert feed(processor, request, letters("ab"))
    finish(request, FinishReason.ERROR, "it broke")
    output = processor.end(request)
    assert (output.text, output.finish_reason, output.error) == ("a", "stop", None)
