"""The prefix cache: a state machine against a model that keeps whole prefixes, and the cases one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mini_infer.memory import PrefixCache
from mini_infer.memory.prefix_cache import ROOT, CachedBlock
from tests.hypothesis_profiles import PROPERTY, STATE_MACHINE

TOKENS = st.lists(st.sampled_from([0, 1]), max_size=9)


class PrefixCacheMachine(RuleBasedStateMachine):
    """The model knows which whole prefix each block holds, and below which entry it was recorded."""

    @initialize(block_size=st.sampled_from([1, 2, 3]))
    def start(self, block_size: int) -> None:
        self.block_size = block_size
        self.cache = PrefixCache(block_size)
        self.holds: dict[int, tuple[int, ...]] = {}  # block: the whole prefix
        self.entry_of: dict[int, int] = {}  # block: its entry
        self.parent_of: dict[int, int] = {}  # entry: its parent, for every entry there ever was
        self.prefix_of: dict[int, tuple[int, ...]] = {ROOT: ()}  # entry: the whole prefix, ditto

    def expected(self, tokens: list[int]) -> list[CachedBlock]:
        """The longest chain of live entries, all but the last token of ``tokens`` at most."""
        hits: list[CachedBlock] = []
        for stop in range(self.block_size, len(tokens), self.block_size):
            parent = hits[-1].entry if hits else ROOT
            found = [
                block
                for block, prefix in self.holds.items()
                if prefix == tuple(tokens[:stop]) and self.parent_of[self.entry_of[block]] == parent
            ]
            assert len(found) <= 1, "one entry has two blocks"
            if not found:
                break
            hits.append(CachedBlock(self.entry_of[found[0]], found[0]))
        return hits

    @rule(tokens=TOKENS)
    def lookup(self, tokens: list[int]) -> None:
        hits = self.cache.lookup(tokens)
        assert hits == self.expected(tokens)
        assert len(hits) * self.block_size <= max(0, len(tokens) - 1), "a hit on the last token"
        for index, hit in enumerate(hits, 1):
            assert self.holds[hit.block] == tuple(tokens[: index * self.block_size])

    @rule(index=st.integers(0, 20), seed=st.integers(0, 7))
    def insert(self, index: int, seed: int) -> None:
        """Below any entry there ever was, evicted ones included: a sequence may outlive the entry it goes on from."""
        parent = sorted(self.prefix_of)[index % len(self.prefix_of)]
        tokens = [seed >> bit & 1 for bit in range(self.block_size)]
        prefix = (*self.prefix_of[parent], *tokens)
        if len(prefix) > 9:
            return
        block = next(block for block in range(1, 1000) if block not in self.holds)  # ids are used again
        same = [
            other
            for other, held in self.holds.items()
            if held == prefix and self.parent_of[self.entry_of[other]] == parent
        ]
        entry = self.cache.insert(parent, tokens, block)
        if same:
            assert entry == self.entry_of[same[0]] and block not in self.cache, "the block that was there must stay"
            return
        assert entry not in self.prefix_of, "an entry id is used twice"
        self.holds[block], self.entry_of[block] = prefix, entry
        self.parent_of[entry], self.prefix_of[entry] = parent, prefix

    @rule(index=st.integers(0, 5))
    def evict(self, index: int) -> None:
        if index < len(self.holds):
            block = list(self.holds)[index]
            self.cache.evict(block)
            del self.holds[block], self.entry_of[block]

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert len(self.cache) == len(self.holds)
        for block in range(len(self.holds) + 3):
            assert (block in self.cache) == (block in self.holds)
        for block, prefix in self.holds.items():
            parent, tokens = self.cache.content(block)
            assert self.prefix_of[parent] + tokens == prefix


TestPrefixCacheMachine = PrefixCacheMachine.TestCase
TestPrefixCacheMachine.settings = STATE_MACHINE


def insert_all(cache: PrefixCache, tokens: list[int], blocks: list[int]) -> list[int]:
    """Record a prefix, two tokens a block; the entries."""
    entries, parent = [], ROOT
    for index, block in enumerate(blocks):
        parent = cache.insert(parent, tokens[2 * index : 2 * index + 2], block)
        entries.append(parent)
    return entries


def blocks_of(hits: list[CachedBlock]) -> list[int]:
    return [hit.block for hit in hits]


@PROPERTY
@given(
    st.integers(1, 4),
    st.lists(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=12), max_size=5),
    st.lists(st.sampled_from([0, 1]), max_size=14),
)
def test_a_hit_is_the_longest_common_run_of_full_blocks(size: int, known: list[list[int]], tokens: list[int]) -> None:
    """Without evictions the cache finds exactly what some recorded prefix has in common with the prompt."""
    cache = PrefixCache(size)
    block = 0
    for prefix in known:
        parent = ROOT
        for start in range(0, len(prefix) - size + 1, size):
            block += 1
            parent = cache.insert(parent, prefix[start : start + size], block)

    def common(prefix: list[int]) -> int:
        count = 0
        while (count + 1) * size <= min(len(prefix), len(tokens) - 1) and (
            prefix[count * size : (count + 1) * size] == tokens[count * size : (count + 1) * size]
        ):
            count += 1
        return count

    assert len(cache.lookup(tokens)) == max(map(common, known), default=0)


def test_the_last_token_is_never_covered() -> None:
    cache = PrefixCache(2)
    insert_all(cache, [1, 2, 3, 4], [10, 11])
    assert blocks_of(cache.lookup([1, 2, 3, 4])) == [10]
    assert blocks_of(cache.lookup([1, 2, 3, 4, 5])) == [10, 11]
    assert blocks_of(cache.lookup([1, 2])) == []
    assert cache.lookup([1]) == cache.lookup([]) == []


def test_equal_blocks_below_different_prefixes_are_different() -> None:
    """The same tokens have other K/V after other tokens: the second block alone says nothing."""
    cache = PrefixCache(2)
    insert_all(cache, [1, 2, 3, 4], [10, 11])
    insert_all(cache, [5, 6, 3, 4], [20, 21])
    assert blocks_of(cache.lookup([5, 6, 3, 4, 0])) == [20, 21]
    assert blocks_of(cache.lookup([1, 2, 3, 4, 0])) == [10, 11]
    assert blocks_of(cache.lookup([3, 4, 0])) == []


def test_tokens_that_hash_alike_are_told_apart() -> None:
    """hash(-1) == hash(-2) in CPython, and so for tuples of them: keys are compared in full."""
    assert hash((ROOT, (-1, 7))) == hash((ROOT, (-2, 7)))
    cache = PrefixCache(2)
    insert_all(cache, [-1, 7], [10])
    assert cache.lookup([-2, 7, 0]) == []
    insert_all(cache, [-2, 7], [20])
    assert blocks_of(cache.lookup([-1, 7, 0])) == [10]
    assert blocks_of(cache.lookup([-2, 7, 0])) == [20]


def test_evict_forgets() -> None:
    cache = PrefixCache(2)
    insert_all(cache, [1, 2, 3, 4], [10, 11])
    cache.evict(11)
    assert blocks_of(cache.lookup([1, 2, 3, 4, 5])) == [10]
    assert 11 not in cache and 10 in cache and len(cache) == 1


def test_children_of_an_evicted_block_are_out_of_reach_for_ever() -> None:
    """Also after the parent's tokens are recorded again in another block: that is a new entry."""
    cache = PrefixCache(2)
    old = insert_all(cache, [1, 2, 3, 4], [10, 11])
    cache.evict(10)
    assert cache.lookup([1, 2, 3, 4, 5]) == []
    assert insert_all(cache, [1, 2], [20]) != old[:1]
    assert blocks_of(cache.lookup([1, 2, 3, 4, 5])) == [20]
    assert 11 in cache
    cache.evict(11)
    assert len(cache) == 1


def test_the_first_block_of_a_prefix_stays() -> None:
    cache = PrefixCache(2)
    first = insert_all(cache, [1, 2, 3, 4], [10, 11])
    assert insert_all(cache, [1, 2, 3, 4], [20, 21]) == first
    assert blocks_of(cache.lookup([1, 2, 3, 4, 5])) == [10, 11]
    assert 20 not in cache and 21 not in cache


def test_only_full_blocks_and_one_prefix_a_block() -> None:
    cache = PrefixCache(2)
    with pytest.raises(AssertionError, match="full blocks"):
        cache.insert(ROOT, [1], 10)
    cache.insert(ROOT, [1, 2], 10)
    with pytest.raises(AssertionError, match="one prefix"):
        cache.insert(ROOT, [3, 4], 10)


def test_content_says_what_a_block_holds() -> None:
    cache = PrefixCache(2)
    first, _ = insert_all(cache, [1, 2, 3, 4], [10, 11])
    assert cache.content(10) == (ROOT, (1, 2))
    assert cache.content(11) == (first, (3, 4))
    with pytest.raises(KeyError):
        cache.content(12)
