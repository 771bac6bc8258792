"""What the live requests have generated, by slot: a few array operations take in a whole step's tokens.

A request has a slot from its first admission to its end, whatever becomes of its row in between. Slots are used again
at once; a step that comes back late is told apart by the number of the request that it was launched for. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mini_infer.step import Members, SampledTokens

NO_SLOT = -1
"""The slot of a request that was never admitted, or has ended."""
NOBODY = -1
"""The owner of a free slot."""
FIRST_WIDTH = 64
"""Outputs of each slot that there is a place for at first; it doubles when one has more."""


class OutputTable:
    """Counters and tokens of every request that is under way. It grows as needed.

    Args:
        num_slots: Slots to begin with.

    Attributes:
        owners: [slots] int64, the number of the request whose slot it is, or ``NOBODY``.
        limits: [slots] int64, most tokens that it may generate.
        num_launched: [slots] int64, sampled tokens that are launched, those in flight included.
        num_known: [slots] int64, sampled tokens that were read back.
        logprobs: [slots] float64, sum of the log probabilities of the known tokens.
    """

    def __init__(self, num_slots: int) -> None:
        self.owners = np.full(num_slots, NOBODY, dtype=np.int64)
        self.limits = np.zeros(num_slots, dtype=np.int64)
        self.num_launched = np.zeros(num_slots, dtype=np.int64)
        self.num_known = np.zeros(num_slots, dtype=np.int64)
        self.logprobs = np.zeros(num_slots, dtype=np.float64)
        self._tokens = np.zeros((num_slots, FIRST_WIDTH), dtype=np.int32)  # [slots, outputs]
        self._free = list(range(num_slots - 1, -1, -1))
        self._stop_tokens: Counter[int] = Counter()  # how many live requests each token would end

    @property
    def num_slots(self) -> int:
        """Slots there are."""
        return len(self.owners)

    def open(self, owner: int, limit: int, stop_token_ids: Iterable[int]) -> int:
        """A slot for request number ``owner``, which may generate ``limit`` tokens."""
        if not self._free:
            self._add_slots()
        slot = self._free.pop()
        self.owners[slot] = owner
        self.limits[slot] = limit
        self.num_launched[slot] = self.num_known[slot] = 0
        self.logprobs[slot] = 0.0
        self._stop_tokens.update(stop_token_ids)
        return slot

    def close(self, slot: int, stop_token_ids: Iterable[int]) -> None:
        """The slot's request has ended. What is still in flight for it will be dropped."""
        self.owners[slot] = NOBODY
        self._free.append(slot)
        for token_id in stop_token_ids:
            self._stop_tokens[token_id] -= 1
            if not self._stop_tokens[token_id]:
                del self._stop_tokens[token_id]

    def members(self, slots: NDArray[np.int64]) -> Members:
        """The present owners of ``slots``."""
        return Members(slots, self.owners[slots])

    def alive(self, members: Members) -> NDArray[np.bool_]:
        """Who of a step has not ended since it was launched."""
        return np.equal(self.owners[members.slots], members.owners)

    def tokens(self, slot: int, start: int, stop: int) -> list[int]:
        """Known tokens ``start`` to ``stop`` of a slot."""
        known: list[int] = self._tokens[slot, start : min(stop, self.num_known[slot])].tolist()
        return known

    def take_in(self, members: Members, sampled: SampledTokens) -> NDArray[np.int64]:
        """Append one token for each of ``members``, but for those who have ended and those whose logits were NaN.

        Returns:
            Indices of those who need a closer look: it is their first token, their last one allowed, a NaN, or a stop
            token of somebody's.
        """
        alive = self.alive(members)
        is_nan = np.isnan(sampled.logprobs)
        kept = np.flatnonzero(alive & ~is_nan)
        slots, token_ids = members.slots[kept], sampled.token_ids[kept]
        index = self.num_known[slots]
        while index.max(initial=0) >= self._tokens.shape[1]:
            self._tokens = _enlarged(self._tokens, (self._tokens.shape[0], 2 * self._tokens.shape[1]))
        self._tokens[slots, index] = token_ids
        self.num_known[slots] = index + 1
        self.logprobs[slots] += sampled.logprobs[kept]
        notable = (index == 0) | (index + 1 >= self.limits[slots])
        if not self._stop_tokens.keys().isdisjoint(token_ids.tolist()):
            notable |= np.isin(token_ids, list(self._stop_tokens))
        found = alive & is_nan
        found[kept] = notable
        return np.flatnonzero(found)

    def _add_slots(self) -> None:
        old = len(self.owners)
        self.owners = _enlarged(self.owners, (2 * old,), fill=NOBODY)
        self.limits = _enlarged(self.limits, (2 * old,))
        self.num_launched = _enlarged(self.num_launched, (2 * old,))
        self.num_known = _enlarged(self.num_known, (2 * old,))
        self.logprobs = _enlarged(self.logprobs, (2 * old,))
        self._tokens = _enlarged(self._tokens, (2 * old, self._tokens.shape[1]))
        self._free = list(range(2 * old - 1, old - 1, -1))


def _enlarged(array: NDArray[Any], shape: tuple[int, ...], fill: int = 0) -> NDArray[Any]:
    """A copy of ``array`` in the corner of a larger one."""
    larger = np.full(shape, fill, dtype=array.dtype)
    larger[tuple(slice(size) for size in array.shape)] = array
    return larger
