"""One request on its way through the engine. Written by the scheduler alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from mini_infer.sampling import SamplingParams
from mini_infer.typing import NO_ROW


class RequestStatus(Enum):
    """Where a request is."""

    WAITING = "waiting"
    """In the queue: nothing of it is in the KV cache (never started, or preempted by recompute)."""
    PREFILLING = "prefilling"
    """Admitted: it has its blocks, and its prompt is being computed chunk by chunk."""
    RUNNING = "running"
    """Decoding: it has a row."""
    SWAPPED = "swapped"
    """Preempted by swap: its K/V is in CPU blocks."""
    DRAINING = "draining"
    """All of its steps are launched; it has no row any more and waits for its last tokens."""
    FINISHED = "finished"


class FinishReason(str, Enum):
    """Why a request ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the model's maximum length."""
    ABORT = "abort"
    """The user took it back."""
    ERROR = "error"
    """It failed inside the engine; its output says how."""


@dataclass(eq=False, slots=True)
class Request:
    """The scheduler's record of one request.

    ``num_tokens`` counts tokens that are launched but not read back yet, so that steps can be scheduled ahead of
    the device; ``output_token_ids`` holds only what came back.

    Attributes:
        request_id: Unique id.
        prompt_token_ids: The prompt, at least one token.
        sampling: What the user asked of the sampler.
        seed: Seed of its draws, resolved.
        stop_token_ids: Every token that ends it: the model's own (unless ignored) and the user's.
        max_output_tokens: ``max_tokens`` cut to what the model's maximum length leaves.
        arrival: Its place in the order of arrival.
        output_token_ids: Generated tokens, as read back from the device.
        cumulative_logprob: Sum of the log probabilities of the generated tokens (model's own, temperature 1).
        num_computed_tokens: Tokens whose K/V is written once every launched step has run.
        num_in_flight: Sampled tokens that are launched but not read back.
        num_chunks_in_flight: Chunks of its prompt that are launched but not read back, the last one not counted.
        prefill_target: Tokens to compute before it decodes (again).
        row: Its row in the decode batch, or ``NO_ROW``.
        num_preemptions: How often it lost its place.
        error: What went wrong, when ``finish_reason`` is ``ERROR``.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    max_output_tokens: int = 1
    arrival: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    num_chunks_in_flight: int = 0
    prefill_target: int = 0
    num_cached_tokens: int = 0
    row: int = NO_ROW
    num_preemptions: int = 0
    error: str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, those in flight included."""
        return len(self.output_token_ids) + self.num_in_flight

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, those in flight included."""
        return len(self.prompt_token_ids) + self.num_output_tokens

    @property
    def finished(self) -> bool:
        """True once it has a finish reason."""
        return self.status is RequestStatus.FINISHED

    def known_token_ids(self) -> list[int]:
        """Prompt and generated tokens whose values are known on the host."""
        return [*self.prompt_token_ids, *self.output_token_ids]

    def token_slice(self, start: int, stop: int) -> tuple[int, ...]:
        """Known tokens ``start`` to ``stop`` without building the whole list."""
        split = len(self.prompt_token_ids)
        if stop <= split:
            return self.prompt_token_ids[start:stop]
        if start >= split:
            return tuple(self.output_token_ids[start - split : stop - split])
        return self.prompt_token_ids[start:] + tuple(self.output_token_ids[: stop - split])
