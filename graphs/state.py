"""The rows that decode, on the device. A decode step reads rows 0 to bucket - 1 and advances them by itself; the host
edits rows only when the membership of the batch or a block table changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mini_infer.kernels.decode_frame import advance_rows
from mini_infer.kernels.penalties import NO_COUNTS, Penalties, token_counts_of
from mini_infer.kernels.row_edit import FIELDS, FIRST_FIELD, HEADER, SAMPLING_FLOATS, SEED, edit_rows
from mini_infer.sampling import SamplingParams
from mini_infer.step import ExtendRow, MoveRow, PlaceRow, RowEdit
from mini_infer.typing import NULL_BLOCK

_SEQ_LEN = FIRST_FIELD + FIELDS.index("seq_len")
_ACTIVE = FIRST_FIELD + FIELDS.index("active")
_TOP_K = FIRST_FIELD + FIELDS.index("top_k")
_COUNT_ROW = FIRST_FIELD + FIELDS.index("count_row")
_FLOATS = slice(FIRST_FIELD + FIELDS.index(SAMPLING_FLOATS[0]), FIRST_FIELD + len(FIELDS))
_PADDING = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters, one entry a row.

    Attributes:
        temperature, top_p, min_p: [rows] float32.
        top_k: [rows] int32.
        seeds: [rows] int64.
        penalties: What tokens that a row has seen lose.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    penalties: Penalties


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decode state of some rows. A padded row is token 0 at length 0, its table all null block.

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

    def advance(self, token_ids: Tensor, logprobs: Tensor) -> Tensor:
        """After a step: the new tokens are at hand, one token longer. Padded rows stay as they are.

        Returns:
            The new tokens for the host, as `Steps` gives them.
        """
        return advance_rows(self.token_ids, self.seq_lens, self.active, token_ids, logprobs)


class DecodeState:
    """All rows of the decode batch, and the only writer of them beside the decode step itself.

    The host keeps a mirror of everything but the tokens: it knows how the steps advance the rows. Edits are made in
    the mirror, and the rows they touched are sent whole, in one copy.

    Args:
        max_num_seqs: Rows.
        max_blocks: Blocks of the longest sequence.
        vocab_size: Tokens of the vocabulary.
        device: Where it lives.

    Attributes:
        token_ids: [max_num_seqs + 1] int64, the token at hand of each row; the last entry takes what no row wants.
        token_counts: [max_num_seqs, vocab_size] int16, the tokens that each row with penalties has seen, as
            `mini_infer.kernels.penalties` describes them.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._mirror = np.zeros((max_num_seqs, HEADER + max_blocks), dtype=np.int32)
        self._mirror[:, 0] = np.arange(max_num_seqs)
        for row in range(max_num_seqs):
            self._clear(row)
        self.token_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.token_counts = torch.zeros((max_num_seqs, vocab_size), dtype=torch.int16, device=device)
        self._fields = torch.zeros((len(FIELDS), max_num_seqs), dtype=torch.int32, device=device)
        self._seeds = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._block_tables = torch.full((max_num_seqs, max_blocks), NULL_BLOCK, dtype=torch.int32, device=device)
        self._send(list(range(max_num_seqs)))

    @property
    def num_rows(self) -> int:
        """Rows there are."""
        return len(self._mirror)

    def rows(self, bucket: int) -> DecodeRows:
        """Rows 0 to ``bucket - 1``, as views that keep their addresses."""
        seq_lens, active, top_k, count_rows, *floats = (field[:bucket] for field in self._fields)
        temperature, top_p, min_p, repetition, presence, frequency = (bits.view(torch.float32) for bits in floats)
        sampling = SamplingRows(
            temperature,
            top_k,
            top_p,
            min_p,
            self._seeds[:bucket],
            Penalties(repetition, presence, frequency, count_rows, self.token_counts),
        )
        return DecodeRows(self.token_ids[:bucket], seq_lens, self._block_tables[:bucket], active, sampling)

    def advanced(self, bucket: int) -> None:
        """A decode step over the first ``bucket`` rows was launched: follow it in the mirror."""
        self._mirror[:bucket, _SEQ_LEN] += self._mirror[:bucket, _ACTIVE]

    def apply(self, edits: Sequence[RowEdit]) -> None:
        """Make the scheduler's edits, in order."""
        if not edits:
            return
        touched: dict[int, None] = {}
        self._mirror[:, 1] = self._mirror[:, 0]  # every row keeps its own token, unless an edit says otherwise
        for edit in edits:
            if isinstance(edit, PlaceRow):
                self._place(edit)
                touched[edit.row] = None
            elif isinstance(edit, MoveRow):
                self._move(edit)
                touched[edit.target] = None
            elif isinstance(edit, ExtendRow):
                start = HEADER + edit.start
                self._mirror[edit.row, start : start + len(edit.block_ids)] = edit.block_ids
                touched[edit.row] = None
            else:
                self._clear(edit.row)
                touched[edit.row] = None
        self._send(list(touched))

    def _place(self, edit: PlaceRow) -> None:
        line = self._mirror[edit.row]
        line[1:3] = -1, edit.token_id or 0
        line[_SEQ_LEN] = edit.seq_len
        line[_ACTIVE] = 1
        write_sampling(line, edit.sampling, edit.seed)
        line[_COUNT_ROW] = NO_COUNTS
        if edit.history is not None:
            line[_COUNT_ROW] = edit.row
            counts = token_counts_of(
                edit.history.prompt_token_ids, edit.history.output_token_ids, self.token_counts.shape[1]
            )
            self.token_counts[edit.row].copy_(to_device(counts, self._device))
        line[HEADER:] = NULL_BLOCK
        line[HEADER : HEADER + len(edit.block_table)] = edit.block_table

    def _move(self, edit: MoveRow) -> None:
        line = self._mirror[edit.target]
        line[1:] = self._mirror[edit.source, 1:]
        if line[_COUNT_ROW] != NO_COUNTS:
            line[_COUNT_ROW] = edit.target
            self.token_counts[edit.target].copy_(self.token_counts[edit.source])

    def _clear(self, row: int) -> None:
        line = self._mirror[row]
        line[1:] = 0
        line[1] = -1
        write_sampling(line, _PADDING, 0)
        line[_COUNT_ROW] = NO_COUNTS
        line[HEADER:] = NULL_BLOCK

    def _send(self, rows: list[int]) -> None:
        stage = to_device(self._mirror[rows], self._device)
        edit_rows(stage, self.token_ids, self._fields, self._seeds, self._block_tables)


def write_sampling(line: np.ndarray, sampling: SamplingParams, seed: int) -> None:
    """Write one row's sampling parameters into its line of `mini_infer.kernels.row_edit`'s format."""
    line[_TOP_K] = sampling.top_k
    floats = tuple(getattr(sampling, name) for name in SAMPLING_FLOATS)
    line[_FLOATS] = np.array(floats, dtype=np.float32).view(np.int32)
    line[SEED : SEED + 2] = np.array((seed,), dtype=np.int64).view(np.int32)


def token_counts_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Bytes of the decode state's token counts, which are nearly all of it."""
    return max_num_seqs * vocab_size * torch.int16.itemsize


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device without waiting for it."""
    if device.type == "cpu":
        return torch.from_numpy(values)
    # The allocator of page-locked memory takes a buffer back only when the copy from it is done.
    pinned = torch.empty(values.shape, dtype=torch.from_numpy(values).dtype, pin_memory=True)
    pinned.numpy()[...] = values
    return pinned.to(device, non_blocking=True)
