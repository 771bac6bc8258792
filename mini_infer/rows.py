"""Which request decodes in which row, and what the device has to be told of it. Pure Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mini_infer.request import Request
from mini_infer.step import ClearRow, ExtendRow, MoveRow, PlaceRow, RowEdit
from mini_infer.typing import NO_ROW


class RowTable:
    """The decode batch: rows 0 to n - 1 are in use, the others are padding. Every change leaves an edit behind."""

    def __init__(self) -> None:
        self._rows: list[Request] = []
        self._ids: tuple[str, ...] | None = ()  # None when stale: it is built once for each change of membership
        self._edits: list[RowEdit] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._rows)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The request of each row, from row 0."""
        if self._ids is None:
            self._ids = tuple(request.request_id for request in self._rows)
        return self._ids

    def enter(self, request: Request, block_table: Sequence[int], token_id: int | None) -> None:
        """Give a request the next row. ``token_id`` None: the token at hand comes from the step's own sampling."""
        request.row = len(self._rows)
        self._rows.append(request)
        self._ids = None
        self._edits.append(
            PlaceRow(request.row, token_id, request.num_tokens, tuple(block_table), request.sampling, request.seed)
        )

    def leave(self, request: Request) -> None:
        """Free a request's row; the last row moves into the hole, so that rows stay dense."""
        last = self._rows.pop()
        if last is not request:
            self._rows[request.row] = last
            self._edits.append(MoveRow(last.row, request.row))
        self._edits.append(ClearRow(last.row))
        last.row = request.row
        request.row = NO_ROW
        self._ids = None

    def clear(self, num_rows: int) -> None:
        """Make all of ``num_rows`` rows padded ones, whatever the device holds. No request may be left in one."""
        assert not self._rows
        self._edits = [ClearRow(row) for row in range(num_rows)]

    def extend(self, request: Request, start: int, block_ids: Sequence[int]) -> None:
        """A request's block table goes on with ``block_ids``, from index ``start``."""
        self._edits.append(ExtendRow(request.row, start, tuple(block_ids)))

    def take_edits(self) -> tuple[RowEdit, ...]:
        """The edits since the last call, in order."""
        edits, self._edits = tuple(self._edits), []
        return edits
