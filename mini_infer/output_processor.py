"""From tokens to what the user gets: text, stop strings, timings, outputs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mini_infer.detokenizer import IncrementalDetokenizer
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


class OutputProcessor:
    """Follows every request from its queueing to its output.

    Args:
        tokenizer: The model's; None makes every text empty.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._tracked: dict[str, _Tracked] = {}
        self._watched: dict[str, _Tracked] = {}  # those whose text is needed as it comes

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracked

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
            Those whose text has come to one of their stop strings now.
        """
        return [tracked.request for tracked in self._watched.values() if _reaches_stop(tracked)]

    def end(self, request: Request) -> GenerateOutput:
        """Make the output of a request that has ended, and stop following it."""
        tracked = self._tracked.pop(request.request_id)
        self._watched.pop(request.request_id, None)
        text = self._text(tracked)
        reason = request.finish_reason
        assert reason is not None, f"{request.request_id} has not ended"
        if tracked.detokenizer is not None and tracked.detokenizer.stopped is not None:
            reason = FinishReason.STOP  # even if the token that completed the stop string was the last one allowed
        return GenerateOutput(
            text=text,
            token_ids=request.output_token_ids,
            finish_reason=reason.value,
            cumulative_logprob=request.cumulative_logprob,
            request_id=request.request_id,
            prompt_token_ids=list(request.prompt_token_ids),
            num_cached_tokens=request.num_cached_tokens,
            timings=RequestTimings(tracked.queued, tracked.first_token, time.perf_counter()),
            error=request.error,
        )

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
            tracked.detokenizer.finish()
            return tracked.detokenizer.text
        if self._tokenizer is None:
            return ""
        token_ids = request.output_token_ids
        return self._tokenizer.decode(token_ids[:-1] if _ended_by_token(request) else token_ids)


def _reaches_stop(tracked: _Tracked) -> bool:
    """Detokenize what has come since the last time. True if the text comes to a stop string with it."""
    request, detokenizer = tracked.request, tracked.detokenizer
    assert detokenizer is not None
    end = request.num_known_outputs - _ended_by_token(request)  # a stop token is no part of the text
    if end <= tracked.num_read or detokenizer.stopped is not None:
        return False
    tracked.new_text.append(detokenizer.push(request.output_slice(tracked.num_read, end)))
    tracked.num_read = end
    return detokenizer.stopped is not None


def _ended_by_token(request: Request) -> bool:
    return request.finish_reason is FinishReason.STOP and request.output_token_ids[-1] in request.stop_token_ids
