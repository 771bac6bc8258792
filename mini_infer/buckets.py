"""Buckets: the sizes that steps are built for, what each costs, and what padding up to them wastes. Pure Python."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mini_infer.config import BUCKET_POLICIES
from mini_infer.exceptions import ConfigError

DENSE_DECODE = 16
"""Up to here every batch size has a decode bucket of its own, by default."""


def decode_bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Default batch sizes: every size to 16, steps of an eighth to a quarter of the size to 64, of 16 to 512, then of
    a thirty-second to a sixteenth of the size."""
    return _dense_sizes(range(1, DENSE_DECODE + 1), max_num_seqs, lambda power: min(power // 4, max(16, power // 16)))


def prefill_bucket_sizes(max_prefill_tokens: int) -> tuple[int, ...]:
    """Default token counts: every multiple of 16 to 128, then steps of an eighth to a quarter of the size."""
    return _dense_sizes(range(16, 129, 16), max_prefill_tokens, lambda power: power // 4)


def _dense_sizes(dense: range, largest: int, stride: Callable[[int], int]) -> tuple[int, ...]:
    """``dense``, then sizes as far apart as ``stride`` says for the power of two that they have reached."""
    sizes = list(dense)
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + stride(1 << (sizes[-1].bit_length() - 1)))
    return (*(size for size in sizes if size < largest), largest)


class BucketTable:
    """The sizes of one kind of step, with the cost of each. Total: every size from 1 to the largest has a bucket.

    Args:
        sizes: Bucket sizes, in any order.
        largest: The largest size that the scheduler may ask for; added if missing, larger sizes are dropped.
        costs: Milliseconds of one step by bucket size. Sizes that were not measured are interpolated; None takes the
            cost as proportional to the size.
        policy: "cost" takes the cheapest bucket that holds a size; "round_up" the next larger one, whatever it costs.

    Raises:
        ConfigError: a size below 1, a cost that is not positive, or an unknown policy.
    """

    def __init__(
        self,
        sizes: Iterable[int],
        largest: int,
        costs: Mapping[int, float] | None = None,
        *,
        policy: str = "cost",
    ) -> None:
        if policy not in BUCKET_POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(BUCKET_POLICIES)}, got {policy!r}")
        kept = sorted({size for size in sizes if size < largest} | {largest})
        if kept[0] < 1:
            raise ConfigError(f"bucket sizes must be at least 1, got {kept[0]}")
        self.sizes: tuple[int, ...] = tuple(kept)
        self.measured = costs is not None
        self._exact_ms = _complete_costs(range(1, largest + 1), costs or {largest: float(largest)})
        self.costs: dict[int, float] = {size: self._exact_ms[size] for size in self.sizes}
        self._by_cost = policy == "cost"
        self._bucket_of = self._covering()

    @property
    def largest(self) -> int:
        """The largest bucket, and the largest size that has one."""
        return self.sizes[-1]

    def bucket(self, size: int) -> int:
        """The bucket that a step of ``size`` runs in: by cost the cheapest that holds it, the smaller of equals."""
        if not 1 <= size <= self.largest:
            raise ConfigError(f"no bucket for size {size}: buckets cover 1 to {self.largest}")
        return self._bucket_of[size]

    def cost(self, size: int) -> float:
        """Milliseconds of a step of ``size``, padding included."""
        return self.costs[self.bucket(size)]

    def exact_cost(self, size: int) -> float:
        """Milliseconds of a step of ``size`` if it had a bucket of its own, from the measured ones around it."""
        return self._exact_ms[size]

    def floor(self, size: int) -> int | None:
        """The largest bucket of at most ``size``, or None."""
        index = bisect_left(self.sizes, size + 1)
        return self.sizes[index - 1] if index else None

    def fill(self, available: int) -> int:
        """How many of ``available`` tokens to take now, so that as little as possible is spent on padding.

        Padding all of them up to one bucket is compared with filling a smaller bucket exactly and padding up the
        rest in a later step. The policy "round_up" always pads.
        """
        available = min(available, self.largest)
        exact = self.floor(available)
        if exact is None or exact == available or not self._by_cost:
            return available
        split = self.costs[exact] + self.cost(available - exact)
        return exact if split < self.cost(available) else available

    def _covering(self) -> list[int]:
        """Bucket by size, index 0 unused."""
        table = [0] * (self.largest + 1)
        best = self.largest
        for size in range(self.largest, 0, -1):
            if size in self.costs and (not self._by_cost or self.costs[size] <= self.costs[best]):
                best = size
            table[size] = best
        return table


def _complete_costs(sizes: Sequence[int], measured: Mapping[int, float]) -> dict[int, float]:
    """A cost for every size: measured, linear between two measured ones, proportional outside them."""
    for size, cost in measured.items():
        if not cost > 0:
            raise ConfigError(f"the cost of bucket {size} must be positive, got {cost}")
    known = sorted(measured)
    costs = {}
    for size in sizes:
        index = bisect_left(known, size)
        if index < len(known) and known[index] == size:
            costs[size] = measured[size]
        elif index == len(known):
            costs[size] = measured[known[-1]] * size / known[-1]
        elif index == 0:
            # A small step is bound by its fixed cost, so it is no cheaper than the smallest one measured; with one
            # figure only, nothing is known of the fixed cost.
            costs[size] = measured[known[0]] * (size / known[0] if len(known) == 1 else 1.0)
        else:
            low, high = known[index - 1], known[index]
            share = (size - low) / (high - low)
            costs[size] = measured[low] + share * (measured[high] - measured[low])
    return costs


@dataclass(frozen=True, slots=True)
class BucketUse:
    """What one bucket was used for.

    Attributes:
        steps: Steps run in it.
        rows: Real rows (decode) or tokens (prefill) of those steps.
        padded: Padded rows or tokens of those steps.
        padding_ms: Milliseconds that those steps cost more than steps of exactly their size would, by the cost table.
        predicted_ms: Milliseconds that those steps were predicted to take, all together, what decode steps read of
            their rows' contexts included.
    """

    steps: int = 0
    rows: int = 0
    padded: int = 0
    padding_ms: float = 0.0
    predicted_ms: float = 0.0

    def __sub__(self, earlier: BucketUse) -> BucketUse:
        """The use since an earlier snapshot."""
        return BucketUse(
            self.steps - earlier.steps,
            self.rows - earlier.rows,
            self.padded - earlier.padded,
            self.padding_ms - earlier.padding_ms,
            self.predicted_ms - earlier.predicted_ms,
        )


def padding_share(uses: Iterable[BucketUse]) -> float:
    """Padded rows as a share of all rows, 0 to 1."""
    rows = padded = 0
    for use in uses:
        rows, padded = rows + use.rows, padded + use.padded
    return padded / (rows + padded) if rows + padded else 0.0


class PaddingCounter:
    """Counts how full each bucket's steps were, and what they were predicted to take."""

    def __init__(self, table: BucketTable) -> None:
        self._table = table
        self._use: dict[int, BucketUse] = {}

    def count(self, size: int, bucket: int, predicted_ms: float) -> None:
        """Record one step of ``size`` real rows in ``bucket``, and what it was predicted to take."""
        use = self._use.get(bucket, BucketUse())
        # Where a larger bucket is the cheaper one, padding up to it loses nothing.
        lost = max(0.0, self._table.costs[bucket] - self._table.exact_cost(size))
        self._use[bucket] = BucketUse(
            use.steps + 1,
            use.rows + size,
            use.padded + bucket - size,
            use.padding_ms + lost,
            use.predicted_ms + predicted_ms,
        )

    @property
    def by_bucket(self) -> dict[int, BucketUse]:
        """Use of every bucket that ran at least once, smallest first."""
        return dict(sorted(self._use.items()))

    @property
    def waste(self) -> float:
        """Padded rows as a share of all rows, 0 to 1."""
        return padding_share(self._use.values())
