"""What becomes of the blocks of a request that loses its place, and how it gets them back. No torch."""

from __future__ import annotations

from mini_infer.buckets import BucketTable
from mini_infer.config import PREEMPTION_MODES
from mini_infer.exceptions import ConfigError
from mini_infer.memory.block_manager import BlockManager, BlockPairs
from mini_infer.request import Request, RequestStatus


class Preemption:
    """Swaps requests out and in, or drops what they had computed, whichever costs less.

    Who loses its place, and who comes back, is the scheduler's decision. The copies pile up until a step takes them.

    Args:
        manager: Whose blocks.
        prefill_buckets: What computing again costs.
        mode: "swap", "recompute", or "auto" for the cheaper one.
        swap_ms_per_block: Milliseconds to move one block one way; None takes swapping as the cheaper one.

    Attributes:
        counts: How often requests lost their place, by "swap" and "recompute".

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(
        self, manager: BlockManager, prefill_buckets: BucketTable, mode: str, swap_ms_per_block: float | None
    ) -> None:
        if mode not in PREEMPTION_MODES:
            raise ConfigError(f"preemption must be one of {', '.join(PREEMPTION_MODES)}, got {mode!r}")
        self._manager = manager
        self._prefill_buckets = prefill_buckets
        self._mode = mode
        self._swap_ms_per_block = swap_ms_per_block
        self._swap_out: BlockPairs = []
        self._swap_in: BlockPairs = []
        self.counts = {"swap": 0, "recompute": 0}

    def anew(self, manager: BlockManager) -> Preemption:
        """The same for the blocks of another manager, with no copies to make; the counts go on."""
        fresh = Preemption(manager, self._prefill_buckets, self._mode, self._swap_ms_per_block)
        fresh.counts = self.counts
        return fresh

    def put_out(self, request: Request) -> None:
        """Take a request's blocks. It is swapped then, or waits to be computed again."""
        pairs = None
        if self._prefers_swap(request):
            pairs = self._manager.swap_out(request.request_id, request.num_computed_tokens)
        request.num_preemptions += 1
        if pairs is not None:
            self._swap_out.extend(pairs)
            request.status = RequestStatus.SWAPPED
            self.counts["swap"] += 1
        else:
            self._manager.release(request.request_id)
            request.num_prefilled_tokens = 0
            request.status = RequestStatus.WAITING
            self.counts["recompute"] += 1

    def bring_back(self, request: Request, *, reserve: int) -> bool:
        """Give a swapped request blocks again, if that leaves ``reserve`` of them free."""
        pairs = self._manager.swap_in(request.request_id, request.num_tokens, reserve=reserve)
        if pairs is None:
            return False
        self._swap_in.extend(pairs)
        return True

    def take_copies(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """What to copy out, and in, since the last call."""
        copies = tuple(self._swap_out), tuple(self._swap_in)
        self._swap_out, self._swap_in = [], []
        return copies

    def _prefers_swap(self, request: Request) -> bool:
        if request.status is not RequestStatus.RUNNING or self._mode == "recompute":
            return False  # a half-computed prompt is begun again: its chunks are cheap next to two copies
        if self._mode == "swap" or self._swap_ms_per_block is None:
            return True
        swap_ms = 2 * self._manager.blocks_for(request.num_computed_tokens) * self._swap_ms_per_block
        return swap_ms < self._prefill_ms(request.num_tokens)

    def _prefill_ms(self, num_tokens: int) -> float:
        """Cost of computing ``num_tokens`` again."""
        buckets = self._prefill_buckets
        full, rest = divmod(num_tokens, buckets.largest)
        return full * buckets.costs[buckets.largest] + (buckets.cost(rest) if rest else 0.0)
