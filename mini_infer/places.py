"""Who waits, who holds blocks and a row, and who makes room when blocks run out. No torch."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from contextlib import suppress

from mini_infer.growth import BlockGrowth
from mini_infer.memory.block_manager import BlockManager
from mini_infer.output_table import OutputTable
from mini_infer.preemption import Preemption
from mini_infer.request import Request, RequestStatus
from mini_infer.rows import RowTable


class Places:
    """The queue, the prompts under way and the rows; requests move between them here, and nowhere else.

    First come, first served: whoever lost its place comes back before anybody who arrived after it.

    Args:
        max_num_seqs: Most requests that hold device blocks and go on.
        manager: Whose blocks.
        outputs: Where outputs are counted; admitted requests get their slot there.
        preemption: What becomes of the blocks of one who loses its place.

    Attributes:
        queue: WAITING and SWAPPED requests, by arrival.
        prefilling: PREFILLING ones, by arrival.
        rows: RUNNING ones.
    """

    def __init__(self, max_num_seqs: int, manager: BlockManager, outputs: OutputTable, preemption: Preemption) -> None:
        self._max_num_seqs = max_num_seqs
        self._manager = manager
        self._outputs = outputs
        self._preemption = preemption
        self.queue: list[Request] = []
        self.prefilling: list[Request] = []
        self.rows = RowTable(max_num_seqs, outputs)
        self._growth = BlockGrowth(manager, self.rows)
        self._no_room: tuple[int, int, int] | None = None  # for whom, and as things were then

    # In

    def admitted(self) -> Iterator[Request]:
        """Requests with prompt tokens to compute: those begun, then new ones for which there is room."""
        yield from list(self.prefilling)
        while self.queue and self.queue[0].status is RequestStatus.WAITING and self._admit(self.queue[0]):
            yield self.queue.pop(0)

    def resume_swapped(self) -> None:
        """Bring swapped requests back while they are first in the queue and there is room.

        One block for each row stays free, so that nothing is swapped out in the step that swaps in: the copies out run
        first, and could overwrite CPU blocks that are still to be read.
        """
        while self.queue and self.queue[0].status is RequestStatus.SWAPPED and self._has_seat():
            request = self.queue[0]
            if request.num_in_flight or not self._preemption.bring_back(request, reserve=len(self.rows)):
                return  # there is nothing to take back: no row has got blocks ahead since it was swapped out
            self.queue.pop(0)
            self._enter_row(request, token_id=request.output_token_ids[-1])

    def end_prefill(self, request: Request) -> None:
        """The step that completes a prompt samples a token, and the request takes up a row with it."""
        self.prefilling.remove(request)
        self._outputs.num_launched[request.slot] += 1
        self._enter_row(request, token_id=None)

    def _admit(self, request: Request) -> bool:
        """Give a waiting request its blocks, if there is room for it now."""
        if request.num_in_flight or request.num_chunks_in_flight or not self._has_seat():
            return False  # steps of its former life must be read back before it begins another
        if self._no_room == self._state_of_room(request):
            return False  # to look a long prompt up takes milliseconds: not at every step
        token_ids = request.known_token_ids()
        cached = self._allocate(request, token_ids)
        if cached is None and self._growth.take_back():
            cached = self._allocate(request, token_ids)
        if cached is None:
            self._no_room = self._state_of_room(request)
            return False
        if request.num_preemptions == 0:
            request.enter(self._outputs)
            request.num_cached_tokens = cached
        request.num_prefilled_tokens = cached
        request.prefill_target = len(token_ids)
        request.status = RequestStatus.PREFILLING
        self.prefilling.append(request)
        return True

    def _enter_row(self, request: Request, token_id: int | None) -> None:
        request.status = RequestStatus.RUNNING
        request_id = request.request_id
        self.rows.enter(request, self._manager.table(request_id), self._manager.capacity(request_id), token_id)

    def _allocate(self, request: Request, token_ids: list[int]) -> int | None:
        return self._manager.allocate_sequence(request.request_id, token_ids, reserve=len(self.rows))

    def _state_of_room(self, request: Request) -> tuple[int, int, int]:
        """Where there was no room for a waiting request, there is none as long as this stays as it is."""
        return request.arrival, self._manager.num_changes, len(self.rows)

    def _has_seat(self) -> bool:
        return len(self.rows) + len(self.prefilling) < self._max_num_seqs

    # Staying

    def grow_rows(self) -> bool:
        """Give every row a block for its next token, preempting the latest arrivals if there are too few.

        Returns:
            True if there are rows to decode.
        """
        short = self.rows.short_of_blocks()
        if short:
            blocked = self.queue and self._has_seat()  # somebody waits for blocks: none are given ahead
            num_blocks = 1 if blocked else self._growth.blocks_at_once()
            for request in sorted(short, key=lambda r: r.arrival):
                while request.status is RequestStatus.RUNNING and not self._growth.extend(request, num_blocks):
                    if not self._growth.take_back():
                        self._preempt(max([*self.rows, *self.prefilling], key=lambda r: r.arrival))
            if num_blocks > 1:
                self._growth.extend_soon(num_blocks)
        return bool(self.rows)

    def _preempt(self, request: Request) -> None:
        """Take a request's blocks and its place; it goes back to the queue, in order of arrival."""
        self._cache_outputs(request)
        if request.status is RequestStatus.RUNNING:
            self.rows.leave(request)
        else:
            self.prefilling.remove(request)
        self._preemption.put_out(request)
        insort(self.queue, request, key=lambda r: r.arrival)

    # Out

    def drain(self, request: Request) -> None:
        """All steps of a running request are launched: its row is free, its blocks are not yet."""
        self.rows.leave(request)
        request.status = RequestStatus.DRAINING

    def remove(self, request: Request, *, cache: bool) -> None:
        """A request has ended, wherever it is.

        Args:
            request: The request.
            cache: Offer what it computed to later prompts.
        """
        if cache:
            self._cache_outputs(request)
        if request.status is RequestStatus.RUNNING:
            self.rows.leave(request)
        elif request.status is RequestStatus.PREFILLING:
            self.prefilling.remove(request)
        elif request.status in (RequestStatus.WAITING, RequestStatus.SWAPPED):
            with suppress(ValueError):  # an interrupt may have kept it from getting there
                self.queue.remove(request)
        if self._manager.has(request.request_id):
            self._manager.release(request.request_id)
        request.leave()

    def _cache_outputs(self, request: Request) -> None:
        """Offer the full blocks of a request that decodes to later prompts, as far as its tokens came back."""
        if request.status not in (RequestStatus.RUNNING, RequestStatus.DRAINING):
            return
        num_final = request.num_prompt_tokens + request.num_known_outputs - 1  # the newest token has no K/V yet
        if num_final >= request.prefill_target:  # else the step that completes its prompt is still in flight
            self._manager.cache_prefix(request.request_id, request.token_slice, num_final)
