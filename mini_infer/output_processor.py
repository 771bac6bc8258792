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

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracked

    def track(self, request: Request, *, streaming: bool) -> None:
        """Begin to follow a request that was just queued."""
        detokenizer = None
        if self._tokenizer is not None and (streaming or request.sampling.stop):
            detokenizer = IncrementalDetokenizer(self._tokenizer, tuple(request.sampling.stop))
        self._tracked[request.request_id] = _Tracked(request, time.perf_counter(), detokenizer)

    def advance(self, request: Request) -> bool:
        """Take in a request's newest token. True if the text has come to one of its stop strings."""
        tracked = self._tracked[request.request_id]
        if tracked.first_token is None:
            tracked.first_token = time.perf_counter()
        if tracked.detokenizer is None or request.error is not None or _ended_by_token(request):
            return False  # a stop token is no part of the text
        tracked.new_text.append(tracked.detokenizer.push(request.output_token_ids[-1:]))
        return tracked.detokenizer.stopped is not None

    def end(self, request: Request) -> GenerateOutput:
        """Make the output of a request that has ended, and stop following it."""
        tracked = self._tracked.pop(request.request_id)
        text = self._text(tracked)
        reason = request.finish_reason
        assert reason is not None, f"{request.request_id} has not ended"
        if tracked.detokenizer is not None and tracked.detokenizer.stopped is not None:
            reason = FinishReason.STOP  # even if the token that completed the stop string was the last one allowed
        return GenerateOutput(
            text=text,
            token_ids=list(request.output_token_ids),
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
        token_ids = tracked.request.output_token_ids[tracked.num_streamed :]
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


def _ended_by_token(request: Request) -> bool:
    return request.finish_reason is FinishReason.STOP and request.output_token_ids[-1] in request.stop_token_ids
