"""One request on its way through the engine. Written by the scheduler alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from mini_infer.exceptions import InvalidRequestError
from mini_infer.output_table import NO_SLOT, OutputTable
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


def check_prompt_length(num_tokens: int, max_model_len: int) -> None:
    """Refuse a prompt of no tokens, or of so many that none can be generated.

    Raises:
        InvalidRequestError: it is empty or too long.
    """
    if num_tokens < 1:
        raise InvalidRequestError("the prompt is empty: at least 1 token is needed")
    if num_tokens >= max_model_len:
        raise InvalidRequestError(
            f"the prompt has {num_tokens} tokens, but max_model_len={max_model_len} allows at most "
            f"{max_model_len - 1}, so that one can be generated; shorten it or raise max_model_len"
        )


@dataclass(eq=False, slots=True)
class Request:
    """The scheduler's record of one request.

    ``num_tokens`` counts tokens that are launched but not read back yet, so that steps can be scheduled ahead of
    the device; ``output_token_ids`` holds only what came back. From its first admission to its end its outputs are in
    a slot of an `OutputTable`, where a step's tokens arrive for all rows at once; then they are its own.

    Attributes:
        request_id: Unique id.
        prompt_token_ids: The prompt, at least one token.
        sampling: What the user asked of the sampler.
        seed: Seed of its draws, resolved.
        stop_token_ids: Every token that ends it: the model's own (unless ignored) and the user's.
        max_output_tokens: ``max_tokens`` cut to what the model's maximum length leaves.
        arrival: Its place in the order of arrival.
        num_prefilled_tokens: Tokens of its present prefill that are launched, or were found in the prefix cache.
        num_chunks_in_flight: Chunks of its prompt that are launched but not read back, the last one not counted.
        prefill_target: Tokens to compute before it decodes (again).
        num_cached_tokens: Tokens of its prompt that the prefix cache had.
        row: Its row in the decode batch, or ``NO_ROW``.
        slot: Its slot in the output table, or ``NO_SLOT``.
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
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_prefilled_tokens: int = 0
    num_chunks_in_flight: int = 0
    prefill_target: int = 0
    num_cached_tokens: int = 0
    row: int = NO_ROW
    slot: int = NO_SLOT
    num_preemptions: int = 0
    error: str | None = None
    _table: OutputTable | None = field(default=None, repr=False)
    _outputs: tuple[int, ...] = field(default=(), repr=False)  # once it has left the table
    _logprob: float = field(default=0.0, repr=False)

    def enter(self, table: OutputTable) -> None:
        """Its outputs are counted in a slot of ``table`` from now on."""
        self.slot, self._table = table.open(self.arrival, self.max_output_tokens, self.stop_token_ids), table

    def finish(self, reason: FinishReason, error: str | None) -> None:
        """It has ended. From the last of these lines on it is `finished`."""
        self.finish_reason = reason
        self.error = error
        self.status = RequestStatus.FINISHED

    def leave(self) -> None:
        """It has ended: what was read back is its own, and its slot is free."""
        if self._table is not None:
            self._outputs = tuple(self.output_slice(0, self.num_known_outputs))
            self._logprob = self.cumulative_logprob
            self._table.close(self.slot, self.stop_token_ids)
            self._table, self.slot = None, NO_SLOT

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, those in flight included."""
        return len(self._outputs) if self._table is None else int(self._table.num_launched[self.slot])

    @property
    def num_known_outputs(self) -> int:
        """Generated tokens that were read back."""
        return len(self._outputs) if self._table is None else int(self._table.num_known[self.slot])

    @property
    def num_in_flight(self) -> int:
        """Sampled tokens that are launched but not read back."""
        return self.num_output_tokens - self.num_known_outputs

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens, those in flight included."""
        return len(self.prompt_token_ids) + self.num_output_tokens

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose K/V is written once every launched step has run: until it decodes, those of its prefill."""
        if self.status in (RequestStatus.WAITING, RequestStatus.PREFILLING):
            return self.num_prefilled_tokens
        return self.num_tokens - 1  # nobody has computed with the newest token yet

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens, as read back from the device (a copy)."""
        return self.output_slice(0, self.num_known_outputs)

    @property
    def cumulative_logprob(self) -> float:
        """Sum of the log probabilities of the generated tokens (after penalties, temperature 1)."""
        return self._logprob if self._table is None else float(self._table.logprobs[self.slot])

    @property
    def finished(self) -> bool:
        """True once it has a finish reason."""
        return self.status is RequestStatus.FINISHED

    def output_slice(self, start: int, stop: int) -> list[int]:
        """Known generated tokens ``start`` to ``stop``."""
        if self._table is None:
            return list(self._outputs[start:stop])
        return self._table.tokens(self.slot, start, stop)

    def known_token_ids(self) -> list[int]:
        """Prompt and generated tokens whose values are known on the host."""
        return [*self.prompt_token_ids, *self.output_token_ids]

    def token_slice(self, start: int, stop: int) -> tuple[int, ...]:
        """Known tokens ``start`` to ``stop`` without building the whole list."""
        split = len(self.prompt_token_ids)
        if stop <= split:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + tuple(self.output_slice(max(start - split, 0), stop - split))
