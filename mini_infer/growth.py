"""Blocks for rows that outgrow theirs: a few ahead while there are plenty, so that rows are seldom edited. No torch."""

from __future__ import annotations

from mini_infer.memory.block_manager import BlockManager
from mini_infer.request import Request
from mini_infer.rows import RowTable

MAX_BLOCKS_AT_ONCE = 4
"""Most blocks that a row gets in one go: the one that it needs, and some ahead."""


class BlockGrowth:
    """Extends rows' block tables, and takes back what they were given ahead when somebody needs it more.

    Args:
        manager: Whose blocks.
        rows: The rows.
    """

    def __init__(self, manager: BlockManager, rows: RowTable) -> None:
        self._manager = manager
        self._rows = rows

    def blocks_at_once(self) -> int:
        """How many blocks to give each row that needs one: as many as leave one for every row after all had theirs."""
        plenty = self._manager.num_free_blocks // len(self._rows) - 1
        return max(1, min(MAX_BLOCKS_AT_ONCE, plenty))

    def extend(self, request: Request, num_blocks: int) -> bool:
        """Give a row a place for its next token, and up to ``num_blocks`` more blocks than it had.

        It gets no more than its longest output needs. False if there are not enough blocks; nothing is given then.
        """
        manager, request_id = self._manager, request.request_id
        before = manager.capacity(request_id)
        longest = request.num_prompt_tokens + request.max_output_tokens - 1  # the last token's K/V is never written
        added = manager.grow(request_id, min(before + num_blocks * manager.block_size, longest))
        if added is None:
            return False
        self._rows.extend(request, manager.capacity(request_id), before // manager.block_size, added)
        return True

    def extend_soon(self, num_blocks: int) -> None:
        """Now that rows are edited anyway, extend those as well that would need it within a block's length."""
        for request in self._rows.short_of_blocks(ahead=self._manager.block_size):
            self.extend(request, num_blocks)

    def take_back(self) -> bool:
        """Take back every block that rows were given ahead. True if there were any."""
        surplus = self._rows.with_room_for(self._manager.block_size)
        for request in surplus:
            self._manager.trim(request.request_id, request.num_tokens)
            self._rows.shorten(request, self._manager.capacity(request.request_id))
        return bool(surplus)
