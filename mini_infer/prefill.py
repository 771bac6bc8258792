"""Prompts cut into the chunks of a prefill step, and prefill's share of the time. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from mini_infer.buckets import BucketTable
from mini_infer.memory.block_manager import BlockManager
from mini_infer.request import Request
from mini_infer.step import PrefillChunk


class PrefillShare:
    """Shares the time between prefill and decode while rows decode.

    After a prefill step decode gets what the share leaves it, rounded to whole steps, and at least one: however large
    the share, no row waits longer for its next token than a prefill step and a decode step take.

    Args:
        share: Prefill's, in (0, 1]. At 1 decode gets nothing while there are prompts to compute.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._lead_ms = 0.0  # how far prefill is ahead of its share
        self._owes_step = False  # no decode step since the last prefill step

    @property
    def is_ahead(self) -> bool:
        """True if decode may be due."""
        return self._owes_step or self._lead_ms > 0

    def is_decode_due(self, ms: float) -> bool:
        """True if decode is to go before prefill; its next step is predicted to take ``ms``."""
        return self._owes_step or self._lead_ms > ms * self._share / 2

    def prefilled(self, ms: float) -> None:
        """A prefill step took its time from rows that decode."""
        self._lead_ms += ms * (1 - self._share)
        self._owes_step = self._share < 1

    def decoded(self, ms: float) -> None:
        """A decode step; what it leaves over is not saved up."""
        self._lead_ms = max(0.0, self._lead_ms - ms * self._share)
        self._owes_step = False

    def reset(self) -> None:
        """Nobody decodes: there is no time to share."""
        self._lead_ms = 0.0
        self._owes_step = False


def plan_chunks(
    candidates: Iterator[Request], buckets: BucketTable, manager: BlockManager, *, max_chunks: int
) -> list[PrefillChunk]:
    """Chunks for the next prefill step, as many tokens as fill a bucket best.

    Args:
        candidates: Requests with blocks and prompt tokens to compute, first come first; only as many are drawn as can
            be of use.
        buckets: The sizes of a step, and what they cost.
        manager: Knows the block tables.
        max_chunks: Most chunks of the step.
    """
    chosen: list[Request] = []
    available = 0
    for request in candidates:
        chosen.append(request)
        available += request.prefill_target - request.num_prefilled_tokens
        if available >= buckets.largest or len(chosen) == max_chunks:
            break
    if not available:
        return []
    budget = buckets.fill(available)
    chunks = []
    for request in chosen:
        start = request.num_prefilled_tokens
        stop = min(request.prefill_target, start + budget)
        chunks.append(
            PrefillChunk(
                request.request_id,
                start,
                request.token_slice(start, stop),
                tuple(manager.table(request.request_id)),
                request.sampling,
                request.seed,
                is_last=stop == request.prefill_target,
            )
        )
        budget -= stop - start
        if not budget:
            break
    return chunks
