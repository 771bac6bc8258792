"""Buckets: total for every size, priced, cheapest first; and the counter of what padding wastes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.buckets import (
    BucketTable,
    BucketUse,
    PaddingCounter,
    decode_bucket_sizes,
    padding_share,
    prefill_bucket_sizes,
)
from mini_infer.exceptions import ConfigError
from mini_infer.request import Request
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from tests.hypothesis_profiles import PROPERTY
from tests.simulated_device import sampled_tokens


@st.composite
def tables(draw: st.DrawFn) -> BucketTable:
    """Any sizes, some of them measured, at costs that may fall and jump."""
    largest = draw(st.integers(1, 60))
    sizes = draw(st.sets(st.integers(1, 80), max_size=8))
    measured = draw(st.none() | st.dictionaries(st.integers(1, 80), st.floats(0.01, 100.0), min_size=1, max_size=6))
    return BucketTable(sizes, largest, measured)


@pytest.mark.parametrize("default_sizes", [decode_bucket_sizes, prefill_bucket_sizes])
def test_default_tables_cover_every_size_for_every_maximum(default_sizes) -> None:
    """The hole of other engines: a maximum off the stride, and the sizes just below it have no bucket."""
    for largest in range(1, 601):
        sizes = default_sizes(largest)
        assert sizes == tuple(sorted(set(sizes))) and sizes[0] >= 1 and sizes[-1] == largest
        table = BucketTable(sizes, largest)
        assert table.sizes == sizes
        for size in range(1, largest + 1):
            assert size <= table.bucket(size) <= largest


def test_default_decode_sizes_are_dense() -> None:
    """No padding to 16 rows, at most a fifth of a batch above that, 16 rows at most; and not too many graphs."""
    assert decode_bucket_sizes(20) == (*range(1, 17), 20)
    sizes = decode_bucket_sizes(256)
    assert sizes == (*range(1, 17), 20, 24, 28, *range(32, 64, 8), *range(64, 257, 16))
    table = BucketTable(sizes, 256)
    for size in range(1, 257):
        assert (table.bucket(size) - size) / table.bucket(size) <= 0.2
        assert table.bucket(size) - size < 16
    assert decode_bucket_sizes(2048)[-4:] == (1856, 1920, 1984, 2048) and len(decode_bucket_sizes(2048)) <= 90


def test_default_prefill_sizes_are_dense() -> None:
    assert prefill_bucket_sizes(100) == (16, 32, 48, 64, 80, 96, 100)
    sizes = prefill_bucket_sizes(8192)
    assert sizes[:8] == tuple(range(16, 129, 16)) and len(sizes) <= 40
    assert all(after - before <= max(16, before / 4) for before, after in pairwise(sizes))


@PROPERTY
@given(tables())
def test_every_size_gets_the_cheapest_bucket_that_holds_it(table: BucketTable) -> None:
    for size in range(1, table.largest + 1):
        bucket = table.bucket(size)
        covering = [candidate for candidate in table.sizes if candidate >= size]
        cheapest = min(table.costs[candidate] for candidate in covering)
        assert bucket in covering and table.costs[bucket] == cheapest == table.cost(size)
        assert all(table.costs[other] > cheapest for other in covering if other < bucket), "not the smaller of equals"


@PROPERTY
@given(st.sets(st.integers(1, 80), max_size=8), st.integers(1, 60))
def test_sizes_are_those_given_and_the_largest(sizes: set[int], largest: int) -> None:
    table = BucketTable(list(sizes), largest)
    assert set(table.sizes) == {size for size in sizes if size < largest} | {largest}
    assert table.largest == largest and set(table.costs) == set(table.sizes)
    for size in range(largest + 2):
        fitting = [bucket for bucket in table.sizes if bucket <= size]
        assert table.floor(size) == (max(fitting) if fitting else None)


@PROPERTY
@given(tables(), st.integers(1, 200))
def test_fill_takes_something_and_never_more_than_there_is(table: BucketTable, available: int) -> None:
    assert 1 <= table.fill(available) <= min(available, table.largest)


@PROPERTY
@given(tables(), st.integers(1, 200))
def test_filling_never_costs_more_than_padding(table: BucketTable, available: int) -> None:
    """All of it by `fill`, against full largest buckets and one padded step for the rest."""
    spent, left = 0.0, available
    while left:
        taken = table.fill(left)
        spent += table.cost(taken)
        left -= taken
    full, rest = divmod(available, table.largest)
    naive = full * table.cost(table.largest) + (table.cost(rest) if rest else 0.0)
    assert spent <= naive * (1 + 1e-9)


@PROPERTY
@given(tables(), st.integers(1, 60))
def test_fill_takes_all_or_a_whole_bucket(table: BucketTable, available: int) -> None:
    taken = table.fill(available)
    assert taken == min(available, table.largest) or taken in table.sizes


def test_fill_by_cost() -> None:
    """17 tokens: 16 and then 1 if a second step is cheap; all in a bucket of 32 if it is not."""
    cheap = BucketTable([1, 16, 32], 32, {1: 0.1, 16: 1.0, 32: 2.0})
    assert cheap.fill(17) == 16
    dear = BucketTable([1, 16, 32], 32, {1: 1.9, 16: 2.0, 32: 2.2})
    assert dear.fill(17) == 17
    assert dear.fill(16) == 16 and dear.fill(1000) == 32


def test_cost_is_proportional_when_nothing_was_measured() -> None:
    table = BucketTable([2, 4], 8)
    assert not table.measured
    assert table.costs == {2: 2.0, 4: 4.0, 8: 8.0}
    assert [table.bucket(size) for size in range(1, 9)] == [2, 2, 4, 4, 8, 8, 8, 8]


def test_missing_costs_lie_on_the_line_between_measured_ones() -> None:
    table = BucketTable([1, 4, 6, 8, 16], 32, {4: 1.0, 8: 3.0, 16: 4.0})
    assert table.measured
    assert table.costs[6] == pytest.approx(2.0)
    assert table.costs[4] == 1.0 and table.costs[8] == 3.0 and table.costs[16] == 4.0
    assert table.costs[1] == 1.0, "no cheaper than the smallest step that was measured"
    assert table.costs[32] == pytest.approx(8.0), "proportional beyond the largest that was measured"


def test_one_measured_cost_is_taken_as_proportional() -> None:
    assert BucketTable([2, 4], 8, {4: 6.0}).costs == {2: 3.0, 4: 6.0, 8: 12.0}


@PROPERTY
@given(tables())
def test_costs_are_positive_and_finite(table: BucketTable) -> None:
    assert all(0 < cost < math.inf for cost in table.costs.values())


def test_a_larger_bucket_that_is_cheaper_is_taken() -> None:
    """Measured costs need not rise: tile sizes and split counts make steps."""
    table = BucketTable([1, 2, 3], 4, {1: 1.0, 2: 5.0, 3: 5.0, 4: 2.0})
    assert [table.bucket(size) for size in (1, 2, 3, 4)] == [1, 4, 4, 4]


@pytest.mark.parametrize("size", [0, -1, 9])
def test_sizes_outside_the_table(size: int) -> None:
    with pytest.raises(ConfigError, match=f"no bucket for size {size}: buckets cover 1 to 8"):
        BucketTable([4], 8).bucket(size)


@pytest.mark.parametrize(("sizes", "largest"), [([0, 4], 8), ([-3], 8), ([], 0), ([4], -1)])
def test_sizes_below_one_are_refused(sizes: list[int], largest: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        BucketTable(sizes, largest)


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan])
def test_costs_that_are_not_positive_are_refused(cost: float) -> None:
    with pytest.raises(ConfigError, match="the cost of bucket 4 must be positive"):
        BucketTable([4], 8, {4: cost})


@PROPERTY
@given(tables(), st.lists(st.integers(1, 60), max_size=20))
def test_padding_counter_adds_up(table: BucketTable, sizes: list[int]) -> None:
    counter = PaddingCounter(table)
    sizes = [min(size, table.largest) for size in sizes]
    for index, size in enumerate(sizes):
        counter.count(size, table.bucket(size), float(index))
    uses = counter.by_bucket
    assert list(uses) == sorted({table.bucket(size) for size in sizes})
    assert sum(use.steps for use in uses.values()) == len(sizes)
    assert sum(use.rows for use in uses.values()) == sum(sizes)
    total = sum(table.bucket(size) for size in sizes)
    assert sum(use.padded for use in uses.values()) == total - sum(sizes)
    for bucket, use in uses.items():
        assert use.rows + use.padded == use.steps * bucket
        lost = [table.cost(size) - table.exact_cost(size) for size in sizes if table.bucket(size) == bucket]
        assert use.padding_ms == pytest.approx(sum(max(0.0, ms) for ms in lost))
        assert use.predicted_ms == sum(index for index, size in enumerate(sizes) if table.bucket(size) == bucket)
    assert padding_share(uses.values()) == counter.waste
    assert counter.waste == pytest.approx((total - sum(sizes)) / total if total else 0.0)


def test_padding_counter_by_hand() -> None:
    counter = PaddingCounter(BucketTable([2], 8, {2: 1.0, 8: 4.0}))
    assert counter.by_bucket == {} and counter.waste == 0.0
    for size, bucket, predicted_ms in ((6, 8, 4.5), (2, 2, 1.25), (5, 8, 7.0)):
        counter.count(size, bucket, predicted_ms)
    assert counter.by_bucket == {2: BucketUse(1, 2, 0, 0.0, 1.25), 8: BucketUse(2, 11, 5, 2.5, 11.5)}
    assert counter.waste == pytest.approx(5 / 18)
    counter.by_bucket.clear()
    assert counter.by_bucket, "the counts can be changed from outside"


def test_padding_loses_what_an_exact_step_would_save() -> None:
    """5 of 8 rows: against the line between 4 and 8. Where the larger step is the cheaper one, nothing is lost."""
    table = BucketTable([1, 2, 4], 8, {1: 1.0, 2: 5.0, 4: 2.0, 8: 4.0})
    assert [table.exact_cost(size) for size in (1, 2, 3, 4, 5, 8)] == [1.0, 5.0, 3.5, 2.0, 2.5, 4.0]
    counter = PaddingCounter(table)
    for size, bucket in ((5, 8), (2, 4), (4, 4)):
        assert table.bucket(size) == bucket
        counter.count(size, bucket, 9.0)
    assert counter.by_bucket == {4: BucketUse(2, 6, 2, 0.0, 18.0), 8: BucketUse(1, 5, 3, 1.5, 9.0)}


def test_use_since_a_snapshot() -> None:
    assert BucketUse(5, 11, 9, 2.5, 30.0) - BucketUse(2, 4, 4, 1.0, 4.5) == BucketUse(3, 7, 5, 1.5, 25.5)
    assert padding_share([]) == 0.0 and padding_share([BucketUse(1, 3, 1), BucketUse(2, 5, 7)]) == 0.5


# The policies


def test_rounding_up_takes_the_next_bucket_whatever_it_costs() -> None:
    costs = {1: 1.0, 2: 5.0, 3: 5.0, 4: 2.0}
    table = BucketTable([1, 2, 3], 4, costs, policy="round_up")
    assert [table.bucket(size) for size in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert BucketTable([16], 32, {16: 0.1, 32: 9.0}, policy="round_up").fill(17) == 17, "padding is all it knows"
    assert BucketTable([16], 32, {16: 0.1, 32: 9.0}).fill(17) == 16


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ConfigError, match="policy must be one of cost, round_up, got 'cheap'"):
        BucketTable([4], 8, policy="cheap")


MEASURED_MS = {1: 0.90, 2: 0.92, 4: 1.05, 5: 1.31, 8: 1.18, 12: 1.29, 16: 1.20, 20: 1.46, 32: 1.40, 48: 1.66, 56: 1.81,
               64: 1.74, 96: 2.11, 112: 2.26, 128: 2.20, 256: 3.08}  # fmt: skip
"""Decode milliseconds as a GPU gives them: tiles and split counts make some sizes cheaper than smaller ones."""


def simulated_ms(policy: str, lengths: list[int], decode_ms: dict[int, float], sizes: tuple[int, ...]) -> float:
    """Predicted milliseconds of all decode steps for requests that are there at once; prompts go first."""
    scheduler = Scheduler(
        max_num_seqs=sizes[-1],
        max_model_len=512,
        block_size=16,
        decode_buckets=BucketTable(sizes, sizes[-1], decode_ms, policy=policy),
        prefill_share=1.0,
        enable_prefix_caching=False,
    )
    for index, length in enumerate(lengths):
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        scheduler.add(Request(str(index), (3,), params, max_output_tokens=length))
    while outputs := scheduler.schedule():
        scheduler.update(outputs, sampled_tokens([9] * outputs.num_seqs, [-1.0] * outputs.num_seqs))
    uses = scheduler.decode_padding.by_bucket
    assert sum(use.rows for use in uses.values()) == sum(lengths) - len(lengths), "each but the prompt's own token"
    return sum(use.steps * scheduler.decode_buckets.costs[bucket] for bucket, use in uses.items())


@pytest.mark.parametrize(("largest", "gain", "gain_by_16"), [(256, 0.004, 0.003), (64, 0.015, 0.01)])
def test_what_cost_gains_on_costs_that_are_not_monotone(largest: int, gain: float, gain_by_16: float) -> None:
    """Requests that end one after the other, so that every batch size runs once: against the same sizes rounded up,
    and against 1, 2, 4, 8 and the multiples of 16."""
    sizes = decode_bucket_sizes(largest)
    costs = BucketTable(sizes, largest, MEASURED_MS).costs
    lengths = list(range(2, largest + 2))
    by_cost = simulated_ms("cost", lengths, costs, sizes)
    assert simulated_ms("round_up", lengths, costs, sizes) > (1 + gain) * by_cost
    sixteens = (1, 2, 4, 8, *range(16, largest + 1, 16))
    assert simulated_ms("round_up", lengths, costs, sixteens) > (1 + gain_by_16) * by_cost


@PROPERTY
@given(
    st.dictionaries(st.integers(1, 24), st.floats(0.01, 100.0), min_size=1, max_size=12),
    st.lists(st.integers(1, 30), min_size=1, max_size=24),
)
def test_cost_is_never_worse_than_rounding_up(decode_ms: dict[int, float], lengths: list[int]) -> None:
    """Whatever the costs: the batches are the same under both, and none of them costs more by cost."""
    sizes = (*sorted(size for size in decode_ms if size < 24), 24)
    by_cost, rounded = (simulated_ms(policy, lengths, decode_ms, sizes) for policy in ("cost", "round_up"))
    assert by_cost <= rounded * (1 + 1e-9)
