"""One step's decision, from the scheduler to the runner, and what comes back. Frozen; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mini_infer.sampling import SamplingParams
from mini_infer.typing import NO_ROW


class StepKind(Enum):
    """What a step does."""

    PREFILL = "prefill"
    """Compute chunks of prompts, packed; sample for those that are complete."""
    DECODE = "decode"
    """One more token for every row."""
    IDLE = "idle"
    """Nothing can run now."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive prompt tokens of one sequence, computed in one step.

    Attributes:
        request_id: Whose tokens.
        start: Position of the first one; everything before it is in the KV cache.
        token_ids: The tokens.
        block_table: The sequence's blocks, enough for the chunk.
        sampling: How to sample after the last prompt token.
        seed: Seed of the draw.
        is_last: True if the chunk completes the prompt, so that a token is sampled.
        row: The decode row that the sequence takes up with the sampled token, or ``NO_ROW`` before its last chunk.
    """

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    is_last: bool
    row: int = NO_ROW

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class History:
    """The tokens that a sequence's penalties look at: all but the one at hand, which its next decode step counts."""

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlaceRow:
    """Put a sequence into a row. ``token_id`` None: the token comes from this step's own sampling.

    ``seq_len`` counts the token at hand, whose K/V the row's next decode step writes. ``history`` is there if
    ``sampling`` has penalties.
    """

    row: int
    token_id: int | None
    seq_len: int
    block_table: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    history: History | None = None


@dataclass(frozen=True, slots=True)
class MoveRow:
    """Copy everything of row ``source`` to row ``target``, which nobody uses any more."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ExtendRow:
    """A row's block table goes on with ``block_ids`` from index ``start``; what stood there is not its own any more."""

    row: int
    start: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClearRow:
    """Make a row a padded one: token 0 at length 0, its table all null block."""

    row: int


RowEdit: TypeAlias = PlaceRow | MoveRow | ExtendRow | ClearRow


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """Who is in a step, so that the scheduler knows where its tokens go. Steps share it until somebody comes or goes.

    Attributes:
        slots: [num_seqs] int64, each request's slot in the `OutputTable`.
        owners: [num_seqs] int64, the number of the request whose slot it was then.
    """

    slots: NDArray[np.int64]
    owners: NDArray[np.int64]

    def select(self, indices: NDArray[np.int64]) -> Members:
        """Some of them."""
        return Members(self.slots[indices], self.owners[indices])

    @staticmethod
    def nobody() -> Members:
        """Those of an idle step."""
        return Members(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class SchedulerOutputs:
    """Everything that the runner needs for one step, and all that it gets. Falsy when there is nothing to run.

    The runner copies ``swap_out``, then ``swap_in``, applies ``edits`` in order, then runs the step.

    Attributes:
        step: Number of the step, counting from 1.
        kind: Prefill, decode or idle.
        bucket: Padded rows (decode) or padded tokens (prefill).
        request_ids: Decode: the request of each row, from row 0. Prefill: the request of each chunk.
        chunks: The prompts' chunks, for a prefill step.
        edits: Changes to the rows of the decode state.
        swap_out: (device block, CPU block) pairs to save.
        swap_in: (device block, CPU block) pairs to bring back.
        reason: Why this step and not another, for people.
        members: Who ``request_ids`` are, for `Scheduler.update`.
    """

    step: int
    kind: StepKind
    bucket: int = 0
    request_ids: tuple[str, ...] = ()
    chunks: tuple[PrefillChunk, ...] = ()
    edits: tuple[RowEdit, ...] = ()
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()
    reason: str = ""
    members: Members = field(default_factory=Members.nobody, repr=False, compare=False)

    @property
    def num_seqs(self) -> int:
        """Real sequences in the step."""
        return len(self.request_ids)

    @property
    def num_tokens(self) -> int:
        """Real tokens in the step."""
        if self.kind is StepKind.PREFILL:
            return sum(len(chunk.token_ids) for chunk in self.chunks)
        return self.num_seqs

    def __bool__(self) -> bool:
        return self.kind is not StepKind.IDLE


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """What a step sampled: one entry for each of `SchedulerOutputs.request_ids`, in order.

    For a chunk that does not complete its prompt the entry means nothing. A log probability of NaN says that the
    model's logits were not finite.

    Attributes:
        token_ids: [num_seqs] int32.
        logprobs: [num_seqs] float32, natural.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def select(self, indices: NDArray[np.int64]) -> SampledTokens:
        """Some of them."""
        return SampledTokens(self.token_ids[indices], self.logprobs[indices])


@dataclass(frozen=True, slots=True)
class CaptureRecord:
    """What one graph cost to make.

    Attributes:
        kind: Prefill or decode.
        bucket: Its rows or tokens.
        seconds: Time to warm up and capture it.
        bytes: Device memory that it took beside what the graphs before it had taken.
        step_ms: Milliseconds of one replay as measured after the capture; None if it was not.
    """

    kind: StepKind
    bucket: int
    seconds: float
    bytes: int
    step_ms: float | None = None
