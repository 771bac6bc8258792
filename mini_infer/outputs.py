"""What the user gets back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """When things happened, in seconds of `time.perf_counter`.

    Attributes:
        queued: The request was accepted.
        first_token: Its first token was read back; None if it never got one.
        finished: It ended.
    """

    queued: float
    first_token: float | None
    finished: float

    @property
    def ttft(self) -> float | None:
        """Seconds from acceptance to the first token."""
        return None if self.first_token is None else self.first_token - self.queued

    @property
    def latency(self) -> float:
        """Seconds from acceptance to the end."""
        return self.finished - self.queued


@dataclass(frozen=True, slots=True)
class GenerateOutput:
    """The result of one request. Always truthy, so that ``if output:`` means "it is ready".

    Attributes:
        text: The generated text, without the prompt and without the stop string.
        token_ids: Generated token ids, the end-of-sequence token included.
        finish_reason: "stop", "length", "abort" or "error".
        cumulative_logprob: Sum of the natural-log probabilities of the generated tokens under the model's
            distribution after penalties (temperature 1, nothing cut).
        request_id: The request's id.
        prompt_token_ids: The prompt as the model saw it.
        num_cached_tokens: Prompt tokens that the prefix cache already had.
        timings: When it was queued, got its first token, and finished.
        error: What went wrong, when ``finish_reason`` is "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    cumulative_logprob: float
    request_id: str
    prompt_token_ids: list[int] = field(repr=False)
    num_cached_tokens: int
    timings: RequestTimings = field(repr=False)
    error: str | None = None

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class StreamIncrement:
    """What one step added to a streamed request.

    Attributes:
        request_id: The request's id.
        text: New text since the last increment; may be empty while a character is incomplete.
        token_ids: New token ids since the last increment.
        output: The whole result, on the last increment; None before.
    """

    request_id: str
    text: str
    token_ids: list[int]
    output: GenerateOutput | None = None

    @property
    def finished(self) -> bool:
        """True on the last increment."""
        return self.output is not None
