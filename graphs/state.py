"""What the device knows of the sequences: the rows that decode, and the inputs of a prefill step.

The tensors are made once and keep their addresses. A decode step reads rows 0 to bucket - 1 and advances them; the
host edits rows only when the membership of the batch changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_infer.sampling import SamplingParams
from mini_infer.step import ClearRow, ExtendRow, MoveRow, PlaceRow, PrefillChunk, RowEdit
from mini_infer.typing import NO_ROW, NULL_BLOCK


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters, one entry a row.

    Attributes:
        temperature, top_p, min_p: [rows] float32.
        top_k: [rows] int32.
        seeds: [rows] int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor

    @classmethod
    def make(cls, num_rows: int, device: torch.device) -> SamplingRows:
        """Greedy rows."""
        return cls(
            temperature=torch.zeros(num_rows, dtype=torch.float32, device=device),
            top_k=torch.full((num_rows,), -1, dtype=torch.int32, device=device),
            top_p=torch.ones(num_rows, dtype=torch.float32, device=device),
            min_p=torch.zeros(num_rows, dtype=torch.float32, device=device),
            seeds=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, all of the same length."""
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.seeds)

    def first(self, num_rows: int) -> SamplingRows:
        """A view of the first rows."""
        return SamplingRows(*(tensor[:num_rows] for tensor in self.tensors()))

    def set(self, row: int, sampling: SamplingParams, seed: int) -> None:
        """Write one row."""
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.seeds[row] = seed

    def clear(self, row: int) -> None:
        """Make a row greedy."""
        self.set(row, SamplingParams(temperature=0.0), 0)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decode state of some rows. A padded row is token 0 at length 1, its table all null block.

    Attributes:
        token_ids: [rows] int64, the token at hand, whose K/V the next step writes.
        seq_lens: [rows] int32, tokens including the one at hand.
        block_tables: [rows, max_blocks] int32.
        active: [rows] int32, 1 for a sequence and 0 for padding.
        sampling: How each row draws.
    """

    token_ids: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    active: Tensor
    sampling: SamplingRows

    def first(self, num_rows: int) -> DecodeRows:
        """A view of the first rows."""
        return DecodeRows(
            self.token_ids[:num_rows],
            self.seq_lens[:num_rows],
            self.block_tables[:num_rows],
            self.active[:num_rows],
            self.sampling.first(num_rows),
        )


class DecodeState:
    """All rows of the decode batch, on the device. The only writer of `DecodeRows`.

    Args:
        max_num_seqs: Rows.
        max_blocks: Blocks of the longest sequence.
        device: Where it lives.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self._all = DecodeRows(
            token_ids=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
            seq_lens=torch.ones(max_num_seqs, dtype=torch.int32, device=device),
            block_tables=torch.full((max_num_seqs, max_blocks), NULL_BLOCK, dtype=torch.int32, device=device),
            active=torch.zeros(max_num_seqs, dtype=torch.int32, device=device),
            sampling=SamplingRows.make(max_num_seqs, device),
        )

    def rows(self, bucket: int) -> DecodeRows:
        """Rows 0 to ``bucket - 1``, as views."""
        return self._all.first(bucket)

    def apply(self, edits: Sequence[RowEdit]) -> None:
        """Make the scheduler's edits, in order."""
        for edit in edits:
            if isinstance(edit, PlaceRow):
                self._place(edit)
            elif isinstance(edit, MoveRow):
                self._move(edit.source, edit.target)
            elif isinstance(edit, ExtendRow):
                stop = edit.start + len(edit.block_ids)
                self._all.block_tables[edit.row, edit.start : stop] = self._int32(edit.block_ids)
            else:
                self._clear(edit)

    def advance(self, rows: DecodeRows, token_ids: Tensor) -> None:
        """After a decode step: the new token is at hand, one token longer. Padded rows stay as they are."""
        rows.token_ids.copy_(token_ids * rows.active)
        rows.seq_lens.add_(rows.active)

    def put_tokens(self, rows: Tensor, token_ids: Tensor) -> None:
        """After a prefill step: the sampled tokens are at hand in ``rows`` ([n] int64)."""
        self._all.token_ids.index_copy_(0, rows, token_ids)

    def _place(self, edit: PlaceRow) -> None:
        state, row = self._all, edit.row
        state.token_ids[row] = 0 if edit.token_id is None else edit.token_id
        state.seq_lens[row] = edit.seq_len
        state.block_tables[row] = NULL_BLOCK
        state.block_tables[row, : len(edit.block_table)] = self._int32(edit.block_table)
        state.active[row] = 1
        state.sampling.set(row, edit.sampling, edit.seed)

    def _move(self, source: int, target: int) -> None:
        state = self._all
        columns = (state.token_ids, state.seq_lens, state.block_tables, state.active, *state.sampling.tensors())
        for tensor in columns:
            tensor[target] = tensor[source]

    def _clear(self, edit: ClearRow) -> None:
        state, row = self._all, edit.row
        state.token_ids[row] = 0
        state.seq_lens[row] = 1
        state.block_tables[row] = NULL_BLOCK
        state.active[row] = 0
        state.sampling.clear(row)

    def _int32(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._all.block_tables.device)


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """Packed chunks of prompts, padded to a token bucket.

    The padding tokens are sequences too, token 0 at positions 0, 1, ..., whose tables are all null block: ordinary
    tokens to every kernel.

    Attributes:
        token_ids: [num_tokens] int64.
        positions: [num_tokens] int64.
        slot_mapping: [num_tokens] int64, where each token's K/V goes.
        block_tables: [num_seqs, max_blocks] int32.
        context_lens: [num_seqs] int32, tokens including this chunk's.
        query_start_loc: [num_seqs + 1] int32, where each chunk begins; the last entry is num_tokens.
        last_tokens: [num_seqs] int64, index of each chunk's last token.
        sample_positions: [num_seqs] int64, position of the token to sample.
        sampling: How each sequence draws.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_start_loc: Tensor
    last_tokens: Tensor
    sample_positions: Tensor
    sampling: SamplingRows

    @classmethod
    def pack(
        cls, chunks: Sequence[PrefillChunk], bucket: int, *, block_size: int, max_blocks: int, device: torch.device
    ) -> PrefillInputs:
        """Lay the chunks end to end, and padding after them up to ``bucket`` tokens."""
        token_ids: list[int] = []
        positions: list[int] = []
        starts = [0]
        for chunk in chunks:
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.stop))
            starts.append(len(token_ids))
        tables = [chunk.block_table for chunk in chunks]
        contexts = [chunk.stop for chunk in chunks]
        longest = max_blocks * block_size  # a padding sequence obeys the same limit as any other
        while len(token_ids) < bucket:
            length = min(bucket - len(token_ids), longest)
            token_ids.extend([0] * length)
            positions.extend(range(length))
            starts.append(len(token_ids))
            tables.append(())
            contexts.append(length)
        num_seqs = len(tables)
        block_tables = torch.full((num_seqs, max_blocks), NULL_BLOCK, dtype=torch.int32)
        for index, table in enumerate(tables):
            block_tables[index, : len(table)] = torch.tensor(table, dtype=torch.int32)
        position_ids = torch.tensor(positions)
        query_start_loc = torch.tensor(starts, dtype=torch.int32)
        sequence = torch.repeat_interleave(torch.arange(num_seqs), query_start_loc.diff().long())
        blocks = block_tables[sequence, position_ids // block_size].long()
        sampling = SamplingRows.make(num_seqs, torch.device("cpu"))
        for index, chunk in enumerate(chunks):
            sampling.set(index, chunk.sampling, chunk.seed)
        return cls(
            token_ids=torch.tensor(token_ids).to(device),
            positions=position_ids.to(device),
            slot_mapping=(blocks * block_size + position_ids % block_size).to(device),
            block_tables=block_tables.to(device),
            context_lens=torch.tensor(contexts, dtype=torch.int32).to(device),
            query_start_loc=query_start_loc.to(device),
            last_tokens=(query_start_loc[1:].long() - 1).to(device),
            sample_positions=torch.tensor(contexts).to(device),
            sampling=SamplingRows(*(tensor.to(device) for tensor in sampling.tensors())),
        )

    @staticmethod
    def rows_of(chunks: Sequence[PrefillChunk]) -> tuple[list[int], list[int]]:
        """(index of the chunk, row it takes up) of every chunk that begins to decode."""
        placed = [(index, chunk.row) for index, chunk in enumerate(chunks) if chunk.row != NO_ROW]
        return [index for index, _ in placed], [row for _, row in placed]
