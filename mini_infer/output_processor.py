"""From tokens to what the user gets: text, stop strings, timings, outputs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mini_infer.detokenizer import IncrementalDetokenizer
from mini_infer.exceptions import describe
from mini_infer.outputs import GenerateOutput, RequestTimings, StreamIncrement
from mini_infer.request import FinishReason, Request
from mini_infer.tokenizer import Tokenizer


@dataclass(eq=False, slots=True)
class _Tracked:
    """What is kept of a request beside the scheduler's record."""

    request: Request
    queued: float
    detokenizer: IncrementalDetokenizer | None
    first_token: float | None = None
    num_read: int = 0  # tokens that the detokenizer has
    new_text: list[str] = field(default_factory=list)  # not yet streamed
    num_streamed: int = 0
    error: str | None = None  # why its text went no further


class OutputProcessor:
    """Follows every request from its queueing to its output, and keeps that until it is fetched.

    A tokenizer that fails ends its request, and nobody else's. An interrupt goes on to the caller; what was asked for
    can be asked for again then. But a text that it came in the middle of has failed: half of a token may be in it.

    Args:
        tokenizer: The model's; None makes every text empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._tracked: dict[str, _Tracked] = {}
        self._watched: dict[str, _Tracked] = {}  # those whose text is needed as it comes
        self._outputs: dict[str, GenerateOutput] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracked

    def requests(self) -> list[Request]:
        """The requests that are followed."""
        return [tracked.request for tracked in self._tracked.values()]

    def output(self, request_id: str) -> GenerateOutput | None:
        """An output that is there to be fetched; it stays so."""
        return self._outputs.get(request_id)

    def track(self, request: Request, *, streaming: bool) -> None:
        """Begin to follow a request that was just queued."""
        tracked = _Tracked(request, time.perf_counter(), None)
        self._tracked[request.request_id] = tracked
        if self._tokenizer is not None and (streaming or request.sampling.stop):
            tracked.detokenizer = IncrementalDetokenizer(self._tokenizer, tuple(request.sampling.stop))
            self._watched[request.request_id] = tracked

    def begin(self, request: Request) -> None:
        """A request's first token has come, if it had none before."""
        tracked = self._tracked[request.request_id]
        if tracked.first_token is None and request.num_known_outputs:
            tracked.first_token = time.perf_counter()

    def advance(self) -> list[Request]:
        """Take in the newest tokens of requests whose text is streamed or may end with a stop string.

        Returns:
            Those that are to end here: their text has come to one of their stop strings, or goes no further.
        """
        return [tracked.request for tracked in self._watched.values() if _is_over(tracked)]

    def end(self, request: Request) -> GenerateOutput:
        """Make the output of a request that has ended, and stop following it."""
        tracked = self._tracked[request.request_id]
        text = self._text(tracked)
        reason, error = request.finish_reason, request.error
        assert reason is not None, f"{request.request_id} has not ended"
        if tracked.error is not None:
            reason, error = FinishReason.ERROR, error or tracked.error
        elif tracked.detokenizer is not None and tracked.detokenizer.stopped is not None:
            # Even if the token that completed the stop string was the last one allowed, or if a step failed later.
            reason, error = FinishReason.STOP, None
        output = GenerateOutput(
            text=text,
            token_ids=request.output_token_ids,
            finish_reason=reason.value,
            cumulative_logprob=request.cumulative_logprob,
            request_id=request.request_id,
            prompt_token_ids=list(request.prompt_token_ids),
            num_cached_tokens=request.num_cached_tokens,
            timings=RequestTimings(tracked.queued, tracked.first_token, time.perf_counter()),
            error=error,
        )
        self._outputs[request.request_id] = output  # before it is let go: an interrupt in between loses nothing
        self._watched.pop(request.request_id, None)
        del self._tracked[request.request_id]
        return output

    def take(self, request_id: str) -> GenerateOutput | None:
        """Fetch an output, once. None if there is none (any more)."""
        return self._outputs.pop(request_id, None)

    def drop(self, request_id: str) -> None:
        """Stop following a request and let go of its output, if there is such a request."""
        self._watched.pop(request_id, None)
        self._tracked.pop(request_id, None)
        self._outputs.pop(request_id, None)

    def clear(self) -> None:
        """Drop every request."""
        self._watched.clear()
        self._tracked.clear()
        self._outputs.clear()

    def increment(self, request_id: str) -> StreamIncrement:
        """What was added to a streamed request since its last increment."""
        tracked = self._tracked[request_id]
        text, tracked.new_text = "".join(tracked.new_text), []
        token_ids = tracked.request.output_slice(tracked.num_streamed, tracked.request.num_known_outputs)
        tracked.num_streamed += len(token_ids)
        return StreamIncrement(request_id, text, token_ids)

    def _text(self, tracked: _Tracked) -> str:
        request = tracked.request
        if tracked.detokenizer is not None:
            _is_over(tracked, last=True)
            return tracked.detokenizer.text
        if self._tokenizer is None:
            return ""
        token_ids = request.output_token_ids
        try:
            return self._tokenizer.decode(token_ids[:-1] if _ended_by_token(request) else token_ids)
        except Exception as error:
            tracked.error = describe(error)
            return ""


def _is_over(tracked: _Tracked, *, last: bool = False) -> bool:
    """Detokenize what has come since the last time. True if the text has come to a stop string, or goes no further.

    Args:
        tracked: It has a detokenizer.
        last: No more tokens come.
    """
    request, detokenizer = tracked.request, tracked.detokenizer
    assert detokenizer is not None
    if detokenizer.stopped is not None or tracked.error is not None:
        return True
    end = request.num_known_outputs - _ended_by_token(request)  # a stop token is no part of the text
    if end > tracked.num_read or last:
        try:
            tracked.new_text.append(detokenizer.push(request.output_slice(tracked.num_read, end)))
            tracked.num_read = end
            if last:
                detokenizer.finish()
        except BaseException as error:
            tracked.error = describe(error)
            if not isinstance(error, Exception):
                raise
    return detokenizer.stopped is not None or tracked.error is not None


def _ended_by_token(request: Request) -> bool:
    return request.finish_reason is FinishReason.STOP and request.output_token_ids[-1] in request.stop_token_ids
