"""Which request decodes in which row, and what the device has to be told of it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mini_infer.output_table import OutputTable
from mini_infer.request import Request
from mini_infer.step import ClearRow, ExtendRow, History, Members, MoveRow, PlaceRow, RowEdit
from mini_infer.typing import NO_ROW


class RowTable:
    """The decode batch: rows 0 to n - 1 are in use, the others are padding. Every change leaves an edit behind.

    Questions about all rows are answered by array operations, so that a step in which nothing changes costs the host
    the same however many rows there are.

    Args:
        max_num_seqs: Rows.
        outputs: Where the requests' outputs are counted.
    """

    def __init__(self, max_num_seqs: int, outputs: OutputTable) -> None:
        self._outputs = outputs
        self._requests: list[Request] = []
        self._ids: list[str] = []
        self._slots = np.zeros(max_num_seqs, dtype=np.int64)
        self._room = np.zeros(max_num_seqs, dtype=np.int64)  # outputs that each row's blocks have a place for
        self._prompts = np.zeros(max_num_seqs, dtype=np.int64)  # prompt tokens of each row
        self._batch: tuple[tuple[str, ...], Members] | None = None  # None: to be made anew
        self._edits: list[RowEdit] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def batch(self) -> tuple[tuple[str, ...], Members]:
        """The request of each row, from row 0, by id and by slot. Made once for each change of membership."""
        if self._batch is None:
            self._batch = tuple(self._ids), self._outputs.members(self._slots[: len(self)].copy())
        return self._batch

    # Changes

    def enter(self, request: Request, block_table: Sequence[int], capacity: int, token_id: int | None) -> None:
        """Give a request the next row.

        Args:
            request: It has a slot.
            block_table: Its blocks.
            capacity: Tokens that they hold.
            token_id: The token at hand; None: it comes from the step's own sampling.
        """
        row = request.row = len(self)
        self._requests.append(request)
        self._ids.append(request.request_id)
        self._slots[row] = request.slot
        self._room[row] = capacity - request.num_prompt_tokens
        self._prompts[row] = request.num_prompt_tokens
        self._batch = None
        history = None
        if request.sampling.has_penalties:
            known = request.output_token_ids
            history = History(request.prompt_token_ids, tuple(known if token_id is None else known[:-1]))
        self._edits.append(
            PlaceRow(row, token_id, request.num_tokens, tuple(block_table), request.sampling, request.seed, history)
        )

    def leave(self, request: Request) -> None:
        """Free a request's row; the last row moves into the hole, so that rows stay dense."""
        hole, last = request.row, len(self) - 1
        moved, moved_id = self._requests.pop(), self._ids.pop()
        if hole != last:
            self._requests[hole], self._ids[hole] = moved, moved_id
            for by_row in (self._slots, self._room, self._prompts):
                by_row[hole] = by_row[last]
            self._edits.append(MoveRow(last, hole))
        self._edits.append(ClearRow(last))
        moved.row = hole
        request.row = NO_ROW
        self._batch = None

    def extend(self, request: Request, capacity: int, start: int, block_ids: Sequence[int]) -> None:
        """A request's block table goes on with ``block_ids``, from index ``start``, and holds ``capacity`` tokens."""
        self._room[request.row] = capacity - request.num_prompt_tokens
        self._edits.append(ExtendRow(request.row, start, tuple(block_ids)))

    def shorten(self, request: Request, capacity: int) -> None:
        """A request's blocks hold ``capacity`` tokens now: those behind were given back before anything was in them.

        The device is not told: a row reads its table up to its length only.
        """
        self._room[request.row] = capacity - request.num_prompt_tokens

    def clear(self, num_rows: int) -> None:
        """Make all of ``num_rows`` rows padded ones, whatever the device holds. No request may be left in one."""
        assert not self._requests
        self._edits = [ClearRow(row) for row in range(num_rows)]

    def take_edits(self) -> tuple[RowEdit, ...]:
        """The edits since the last call, in order."""
        edits, self._edits = tuple(self._edits), []
        return edits

    # A decode step over all rows

    def num_context_tokens(self, window: int) -> int:
        """Tokens that the next step's rows attend to, all together, each row's new token included.

        Args:
            window: The most that a row attends to; 0 for all of its tokens.
        """
        _, members = self.batch
        lengths = self._prompts[: len(self)] + self._outputs.num_launched[members.slots]
        return int((np.minimum(lengths, window) if window else lengths).sum())

    def launch(self) -> list[Request]:
        """One more token for every row. Returns the requests for which this was the last one."""
        _, members = self.batch
        launched = self._outputs.num_launched[members.slots] + 1
        self._outputs.num_launched[members.slots] = launched
        return self._at(launched >= self._outputs.limits[members.slots])

    def short_of_blocks(self, ahead: int = 0) -> list[Request]:
        """The requests whose blocks have no place for the next step's token, or that of ``ahead`` steps later."""
        _, members = self.batch
        # The K/V of the last output is never written.
        needed = np.minimum(self._outputs.num_launched[members.slots] + ahead, self._outputs.limits[members.slots] - 1)
        return self._at(needed > self._room[: len(self)])

    def with_room_for(self, num_tokens: int) -> list[Request]:
        """The requests whose blocks have a place for ``num_tokens`` tokens after the next step's."""
        _, members = self.batch
        return self._at(self._room[: len(self)] - self._outputs.num_launched[members.slots] >= num_tokens)

    def _at(self, chosen: NDArray[np.bool_]) -> list[Request]:
        return [self._requests[row] for row in np.flatnonzero(chosen).tolist()]
