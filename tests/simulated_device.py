"""The runner as the scheduler's contract describes it, with bookkeeping in place of a model.

Its K/V "bytes" at a position are a digest of every token up to there, so that reading a wrong block, a stale token or
a slot that nobody wrote is noticed at once. The next token is a function of that digest: what a request must generate
is known beforehand (`Reference`) and depends on no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mini_infer.request import FinishReason
from mini_infer.sampling import SamplingParams
from mini_infer.step import (
    ClearRow,
    ExtendRow,
    History,
    MoveRow,
    PlaceRow,
    PrefillChunk,
    SampledTokens,
    SchedulerOutputs,
    StepKind,
)
from mini_infer.typing import NO_ROW, NULL_BLOCK

VOCAB_SIZE = 7
LOGPROB = -0.5
NAN = float("nan")


def sampled_tokens(token_ids: Sequence[int], logprobs: Sequence[float]) -> SampledTokens:
    """As a runner returns them."""
    return SampledTokens(np.array(token_ids, dtype=np.int32), np.array(logprobs, dtype=np.float32))


def digest(before: int, token_id: int) -> int:
    """What K/V depends on: every token up to and including ``token_id``."""
    return hash((before, token_id))


def next_token(state: int) -> int:
    """The "model": the token after a prefix of this digest."""
    return hash((state, -1)) % VOCAB_SIZE


class Reference:
    """What one request must see and generate, computed alone.

    Attributes:
        tokens: The prompt and ``max_output_tokens`` generated tokens, as if nothing ended it earlier.
        states: Digest after each of ``tokens``.
    """

    def __init__(self, prompt: Sequence[int], max_output_tokens: int) -> None:
        self.tokens = list(prompt)
        self.states: list[int] = []
        state = 0
        for index in range(len(prompt) + max_output_tokens):
            if index == len(self.tokens):
                self.tokens.append(next_token(state))
            state = digest(state, self.tokens[index])
            self.states.append(state)
        self.num_prompt_tokens = len(prompt)

    def result(self, stop_token_ids: frozenset[int], nan_at: int | None = None) -> tuple[list[int], FinishReason]:
        """Output and finish reason; the model's logits are NaN for output ``nan_at``."""
        generated = self.tokens[self.num_prompt_tokens :]
        for index, token_id in enumerate(generated):
            if index == nan_at:
                return generated[:index], FinishReason.ERROR
            if token_id in stop_token_ids:
                return generated[: index + 1], FinishReason.STOP
        return generated, FinishReason.LENGTH


@dataclass
class Row:
    """One row of the decode state; the defaults are those of a padded row."""

    token_id: int = 0
    seq_len: int = 0
    table: list[int] = field(default_factory=list)
    sampling: SamplingParams | None = None
    seed: int = 0
    active: bool = False
    prompt: tuple[int, ...] = ()  # what a row with penalties has seen
    counted: list[int] = field(default_factory=list)

    def copy(self) -> Row:
        return replace(self, table=list(self.table), counted=list(self.counted))


@dataclass(frozen=True)
class Expected:
    """What the device checks of a request: its tokens, and how it wants to be sampled."""

    reference: Reference
    sampling: SamplingParams
    seed: int
    nan_at: int | None = None


class SimulatedDevice:
    """Runs steps in the order in which they are launched, and checks everything that they read.

    Args:
        expected: By request id.
    """

    def __init__(
        self,
        expected: Mapping[str, Expected],
        *,
        max_num_seqs: int,
        block_size: int,
        num_gpu_blocks: int,
        num_cpu_blocks: int,
    ) -> None:
        self.expected = expected
        self.block_size = block_size
        self.rows = [Row() for _ in range(max_num_seqs)]
        self.kv: list[list[int | None]] = [[None] * block_size for _ in range(num_gpu_blocks + 1)]
        self.cpu: list[list[int | None]] = [[None] * block_size for _ in range(num_cpu_blocks)]
        self.lost: set[str] = set()  # requests of steps that failed: what they read is not checked any more

    def prepare(self, outputs: SchedulerOutputs) -> None:
        """Everything of a step but the step itself: copies out, copies in, edits."""
        assert len({cpu for _, cpu in outputs.swap_out}) == len(outputs.swap_out), "a CPU block is written twice"
        assert len({gpu for gpu, _ in outputs.swap_in}) == len(outputs.swap_in), "a device block is swapped in twice"
        for gpu, cpu in outputs.swap_out:
            assert gpu != NULL_BLOCK
            self.cpu[cpu] = list(self.kv[gpu])
        for gpu, cpu in outputs.swap_in:
            assert gpu != NULL_BLOCK
            self.kv[gpu] = list(self.cpu[cpu])
        for edit in outputs.edits:
            if isinstance(edit, PlaceRow):
                assert not self.rows[edit.row].active, "a row is placed over another"
                token_id = -1 if edit.token_id is None else edit.token_id
                assert (edit.history is not None) == edit.sampling.has_penalties
                history = edit.history or History((), ())
                self.rows[edit.row] = Row(
                    token_id,
                    edit.seq_len,
                    list(edit.block_table),
                    edit.sampling,
                    edit.seed,
                    active=True,
                    prompt=history.prompt_token_ids,
                    counted=list(history.output_token_ids),
                )
            elif isinstance(edit, MoveRow):
                self.rows[edit.target] = self.rows[edit.source].copy()
            elif isinstance(edit, ExtendRow):
                row = self.rows[edit.row]
                assert row.active and edit.start <= len(row.table), "a table is extended beyond its end"
                assert edit.start * self.block_size >= row.seq_len - 1, "blocks with something in them are replaced"
                row.table[edit.start :] = edit.block_ids
            else:
                assert isinstance(edit, ClearRow)
                self.rows[edit.row] = Row()

    def run(self, outputs: SchedulerOutputs) -> SampledTokens:
        """One step, `prepare` included."""
        self.prepare(outputs)
        if outputs.kind is StepKind.PREFILL:
            return self._prefill(outputs)
        assert outputs.kind is StepKind.DECODE, "an idle step was launched"
        return self._decode(outputs)

    def lose(self, outputs: SchedulerOutputs) -> None:
        """A step that was launched but does not run: its K/V is not written."""
        self.prepare(outputs)
        self.lost.update(outputs.request_ids)

    def _prefill(self, outputs: SchedulerOutputs) -> SampledTokens:
        assert 1 <= outputs.num_tokens <= outputs.bucket
        assert len({chunk.request_id for chunk in outputs.chunks}) == len(outputs.chunks)
        assert outputs.request_ids == tuple(chunk.request_id for chunk in outputs.chunks)
        for chunk in outputs.chunks:  # all of them read what was there before the step
            self._check_chunk(chunk)
        written: set[tuple[int, int]] = set()
        token_ids, logprobs = [], []
        for chunk in outputs.chunks:
            state = 0 if chunk.start == 0 else self._read(chunk.block_table, chunk.start - 1)
            for position, token_id in enumerate(chunk.token_ids, chunk.start):
                state = digest(state or 0, token_id)
                slot = (chunk.block_table[position // self.block_size], position % self.block_size)
                assert slot not in written, "two chunks of a step write one slot"
                written.add(slot)
                self._write(chunk.block_table, position, state)
            if not chunk.is_last:
                assert chunk.row == NO_ROW
                token_ids.append(-1)  # means nothing, and must not be looked at
                logprobs.append(NAN)
                continue
            token_ids.append(next_token(state or 0))
            logprobs.append(self._logprob(chunk.request_id, chunk.stop))
            row = self.rows[chunk.row]
            assert row.active and row.token_id == -1, "the sampled token goes to a row that does not wait for it"
            assert row.seq_len == chunk.stop + 1
            self._check_history(chunk.request_id, row, chunk.stop)
            row.token_id = token_ids[-1]
        return sampled_tokens(token_ids, logprobs)

    def _check_chunk(self, chunk: PrefillChunk) -> None:
        assert len(chunk.token_ids) >= 1, "an empty chunk"
        assert chunk.stop <= len(chunk.block_table) * self.block_size, "the table is too short for the chunk"
        expected = self.expected[chunk.request_id]
        assert chunk.sampling is expected.sampling and chunk.seed == expected.seed
        if chunk.request_id in self.lost:
            return
        tokens = expected.reference.tokens
        assert list(chunk.token_ids) == tokens[chunk.start : chunk.stop], "a chunk has somebody else's tokens"
        self._check_kv(chunk.request_id, chunk.block_table, chunk.start)

    def _decode(self, outputs: SchedulerOutputs) -> SampledTokens:
        num_seqs = outputs.num_seqs
        assert 1 <= num_seqs <= outputs.bucket
        for index, row in enumerate(self.rows):
            assert row.active == (index < num_seqs), "the active rows are not the first ones"
            if not row.active:
                assert row == Row(), "a padded row is not token 0 at length 0 with an empty table"
        assert len(set(outputs.request_ids)) == num_seqs
        for request_id, row in zip(outputs.request_ids, self.rows, strict=False):
            self._check_row(request_id, row)
            row.counted += [row.token_id] if row.sampling.has_penalties else []
            self._check_history(request_id, row, row.seq_len)
        token_ids, logprobs = [], []
        written: set[tuple[int, int]] = set()
        for request_id, row in zip(outputs.request_ids, self.rows, strict=False):
            position = row.seq_len - 1
            slot = (row.table[position // self.block_size], position % self.block_size)
            assert slot not in written, "two rows write one slot"
            written.add(slot)
            state = digest(self._read(row.table, position - 1) or 0, row.token_id)
            self._write(row.table, position, state)
            row.token_id = next_token(state)
            row.seq_len += 1
            token_ids.append(row.token_id)
            logprobs.append(self._logprob(request_id, row.seq_len - 1))
        return sampled_tokens(token_ids, logprobs)

    def _check_row(self, request_id: str, row: Row) -> None:
        assert row.seq_len <= len(row.table) * self.block_size, "the table is too short for the new token"
        expected = self.expected[request_id]
        assert row.sampling is expected.sampling and row.seed == expected.seed
        if request_id in self.lost:
            return
        assert row.seq_len < len(expected.reference.tokens), "a step beyond the last token that was asked for"
        assert row.token_id == expected.reference.tokens[row.seq_len - 1], "the token at hand is not the sequence's"
        self._check_kv(request_id, row.table, row.seq_len - 1)

    def _check_history(self, request_id: str, row: Row, num_tokens: int) -> None:
        """The penalties of a row see the prompt, and what was generated of the first ``num_tokens`` tokens."""
        reference = self.expected[request_id].reference
        if request_id not in self.lost and row.sampling.has_penalties:
            seen = [*row.prompt, *row.counted]
            assert seen == reference.tokens[:num_tokens] and len(row.prompt) == reference.num_prompt_tokens

    def _check_kv(self, request_id: str, table: Sequence[int], num_tokens: int) -> None:
        """Positions 0 to ``num_tokens - 1``, read through the table, are this sequence's own."""
        read = [state for block in table for state in self.kv[block]][:num_tokens]
        assert read == self.expected[request_id].reference.states[:num_tokens], (
            f"{request_id} reads K/V that is not its own: {table}"
        )

    def _logprob(self, request_id: str, position: int) -> float:
        expected = self.expected[request_id]
        is_nan = position - expected.reference.num_prompt_tokens == expected.nan_at
        return NAN if is_nan else LOGPROB

    def _read(self, table: Sequence[int], position: int) -> int | None:
        return self.kv[table[position // self.block_size]][position % self.block_size]

    def _write(self, table: Sequence[int], position: int, state: int) -> None:
        block = table[position // self.block_size]
        assert block != NULL_BLOCK, "a real token is written to the null block"
        self.kv[block][position % self.block_size] = state
