"""The block manager: a state machine against an independent model, and the errors a user sees."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mini_infer.exceptions import BlockError, ConfigError, OutOfMemoryError
from mini_infer.memory import BlockManager
from mini_infer.typing import NULL_BLOCK
from tests.hypothesis_profiles import STATE_MACHINE

# State machine


@dataclass
class ModelSequence:
    """What the model knows of a sequence: its tokens so far and where it believes their K/V to be."""

    tokens: list[int]
    table: list[int]  # device blocks, or CPU blocks while swapped
    swapped: bool = False


TOKENS = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=9)
INDEX = st.integers(0, 5)


class BlockManagerMachine(RuleBasedStateMachine):
    """A model of who uses which block and what was last written to it; every block that comes back is checked.

    ``content[block]`` is the whole prefix up to the block's end, as far as it was written.
    """

    @initialize(
        block_size=st.sampled_from([2, 1, 3]),
        num_gpu_blocks=st.sampled_from([12, 20, 8, 5, 1]),
        num_cpu_blocks=st.sampled_from([20, 6, 0]),
        caching=st.sampled_from([True, True, False]),
    )
    def start(self, block_size: int, num_gpu_blocks: int, num_cpu_blocks: int, caching: bool) -> None:
        self.block_size, self.caching = block_size, caching
        self.gpu_blocks = set(range(1, num_gpu_blocks + 1))
        self.cpu_blocks = set(range(num_cpu_blocks))
        self.manager = BlockManager(block_size, num_gpu_blocks, num_cpu_blocks, enable_prefix_caching=caching)
        self.loose: list[int] = []  # handed out by allocate, one entry a reference
        self.sequences: dict[str, ModelSequence] = {}
        self.content: dict[int, tuple[int, ...]] = {}
        self.cpu_content: dict[int, tuple[int, ...]] = {}
        self.offered: set[tuple[int, ...]] = set()  # prefixes that were ever recorded
        self.num_made = 0

    # The model

    def references(self) -> Counter[int]:
        """Users of each device block."""
        tables = [s.table for s in self.sequences.values() if not s.swapped]
        return Counter(self.loose) + Counter(block for table in tables for block in table)

    def num_free(self) -> int:
        return len(self.gpu_blocks) - len(self.references())

    def num_blocks(self, num_tokens: int) -> int:
        return (num_tokens + self.block_size - 1) // self.block_size

    def take(self, blocks: list[int]) -> None:
        """``blocks`` were handed out as new: nobody may be using them, and their content is void."""
        references = self.references()
        assert len(set(blocks)) == len(blocks), "a block was handed out twice"
        for block in blocks:
            assert block in self.gpu_blocks and block != NULL_BLOCK
            assert references[block] == 0, f"block {block} was handed out while in use"
            self.content[block] = ()

    def write(self, sequence: ModelSequence, start: int) -> None:
        """The sequence computes everything from token ``start`` on."""
        for index in range(start // self.block_size, len(sequence.table)):
            self.content[sequence.table[index]] = tuple(sequence.tokens[: (index + 1) * self.block_size])

    def check_unchanged(self, before: tuple[object, ...]) -> None:
        assert self.snapshot() == before, "a call that failed changed something"

    def snapshot(self) -> tuple[object, ...]:
        """Everything that can be seen from outside."""
        manager = self.manager
        tables = {name: manager.table(name) for name, s in self.sequences.items() if not s.swapped}
        capacities = {name: manager.capacity(name) for name in self.sequences}
        counts = (manager.num_free_blocks, manager.num_free_cpu_blocks, manager.num_cached_blocks)
        return tables, capacities, counts

    def pick(self, index: int, swapped: bool) -> str | None:
        names = [name for name, sequence in self.sequences.items() if sequence.swapped is swapped]
        return names[index % len(names)] if names else None

    # The user's methods

    @rule(num_blocks=st.sampled_from([1, 0, 2, 30]))
    def allocate(self, num_blocks: int) -> None:
        fits = num_blocks <= self.num_free()
        assert self.manager.can_allocate(num_blocks) is fits
        if fits:
            blocks = self.manager.allocate(num_blocks)
            assert len(blocks) == num_blocks
            self.take(blocks)
            self.loose.extend(blocks)
            return
        before = self.snapshot()
        with pytest.raises(OutOfMemoryError, match="num_gpu_blocks"):
            self.manager.allocate(num_blocks)
        self.check_unchanged(before)

    @rule(count=st.sampled_from([30, 1, 2]), reverse=st.booleans())
    def free(self, count: int, reverse: bool) -> None:
        blocks = self.loose[:count]
        del self.loose[:count]
        self.manager.free(blocks[::-1] if reverse else blocks)

    @rule(block=st.integers(-1, 22))
    def free_wrongly(self, block: int) -> None:
        """Foreign ids, the null block, a reference too many: refused, and the good ids beside them stay."""
        wrong = [block] * (self.references()[block] + 1)
        before = self.snapshot()
        for blocks in (wrong, [*self.loose, *wrong], [*wrong, *self.loose[:1]]):
            with pytest.raises(BlockError, match=r"block -?\d+ is (not one of|given back)"):
                self.manager.free(blocks)
        self.check_unchanged(before)

    # Sequences

    @rule(tokens=TOKENS, reserve=st.sampled_from([0, 0, 1, 3]))
    def come(self, tokens: list[int], reserve: int) -> None:
        self.allocate_sequence(tokens, reserve)

    def allocate_sequence(self, tokens: list[int], reserve: int) -> str | None:
        name = f"s{self.num_made}"
        self.num_made += 1
        before = self.snapshot()
        cached = self.manager.allocate_sequence(name, tokens, reserve=reserve)
        needed = self.num_blocks(len(tokens))
        if cached is None:
            assert needed + reserve > self.num_free(), "refused, although there was room without any hit"
            assert not self.manager.has(name)
            self.check_unchanged(before)
            return None
        table = self.manager.table(name)
        assert len(table) == needed
        assert cached % self.block_size == 0 and 0 <= cached <= len(tokens) - 1
        hits, new = table[: cached // self.block_size], table[cached // self.block_size :]
        for index, block in enumerate(hits):
            prefix = tuple(tokens[: (index + 1) * self.block_size])
            assert self.content.get(block) == prefix, f"block {block} is a hit but does not hold {prefix}"
            assert prefix in self.offered, "a hit on what was never recorded"
        assert self.caching or not hits
        self.take(new)
        assert not set(new) & set(hits)
        self.sequences[name] = ModelSequence(list(tokens), table)
        self.write(self.sequences[name], cached)
        assert self.num_free() >= reserve, "blocks were taken that had to stay free"
        return name

    @rule(tokens=TOKENS, keep=st.booleans())
    def serve(self, tokens: list[int], keep: bool) -> None:
        """A prompt comes and is computed and recorded; it stays, or goes and leaves its prefix behind."""
        if self.num_blocks(len(tokens)) > self.num_free():  # make room, so that a run does not come to a halt
            for name in list(self.sequences):
                self.give_back(name)
            self.free(len(self.loose), reverse=False)
        name = self.allocate_sequence(tokens, reserve=0)
        if name is not None:
            self.record(name, len(tokens))
            if not keep:
                self.give_back(name)

    @rule(index=INDEX, more=st.lists(st.sampled_from([0, 1]), max_size=5))
    def grow(self, index: int, more: list[int]) -> None:
        name = self.pick(index, swapped=False)
        if name is None:
            return
        sequence = self.sequences[name]
        length = len(sequence.tokens) + len(more)
        missing = max(0, self.num_blocks(length) - len(sequence.table))
        before = self.snapshot()
        added = self.manager.grow(name, length)
        if missing > self.num_free():
            assert added is None
            self.check_unchanged(before)
            return
        assert added is not None and len(added) == missing
        self.take(added)
        start = len(sequence.tokens)
        sequence.tokens.extend(more)
        sequence.table.extend(added)
        assert self.manager.table(name) == sequence.table
        self.write(sequence, start)

    @rule(index=INDEX, num_blocks=st.integers(1, 3))
    def grow_ahead(self, index: int, num_blocks: int) -> None:
        """Blocks for tokens that are still to come."""
        name = self.pick(index, swapped=False)
        if name is None:
            return
        sequence = self.sequences[name]
        before = self.snapshot()
        added = self.manager.grow(name, (len(sequence.table) + num_blocks) * self.block_size)
        if num_blocks > self.num_free():
            assert added is None
            self.check_unchanged(before)
            return
        assert added is not None and len(added) == num_blocks
        self.take(added)
        sequence.table.extend(added)
        self.write(sequence, len(sequence.tokens))

    @rule(index=INDEX)
    def trim(self, index: int) -> None:
        """Blocks without a token go back, and no others."""
        name = self.pick(index, swapped=False)
        if name is not None:
            sequence = self.sequences[name]
            self.manager.trim(name, len(sequence.tokens))
            del sequence.table[self.num_blocks(len(sequence.tokens)) :]

    @rule(index=INDEX, share=st.sampled_from([1.0, 0.5]))
    def cache_prefix(self, index: int, share: float) -> None:
        name = self.pick(index, swapped=False)
        if name is not None:
            self.record(name, int(len(self.sequences[name].tokens) * share))

    def record(self, name: str, num_tokens: int) -> None:
        sequence = self.sequences[name]

        def tokens(start: int, stop: int) -> list[int]:
            assert 0 <= start < stop <= num_tokens, "tokens were asked for that are not final"
            return sequence.tokens[start:stop]

        self.manager.cache_prefix(name, tokens, num_tokens)
        if self.caching:
            for stop in range(self.block_size, num_tokens + 1, self.block_size):
                self.offered.add(tuple(sequence.tokens[:stop]))

    @rule(index=INDEX, swapped=st.booleans())
    def release(self, index: int, swapped: bool) -> None:
        name = self.pick(index, swapped)
        if name is not None:
            self.give_back(name)

    def give_back(self, name: str) -> None:
        self.manager.release(name)
        del self.sequences[name]
        assert not self.manager.has(name)

    @rule(index=INDEX, drop=st.integers(0, 1))
    def swap_out(self, index: int, drop: int) -> None:
        """``drop``: the last token has no K/V yet, as with a sequence that decodes."""
        name = self.pick(index, swapped=False)
        if name is None:
            return
        sequence = self.sequences[name]
        length = max(1, len(sequence.tokens) - drop)
        used = {block for s in self.sequences.values() if s.swapped for block in s.table}
        before = self.snapshot()
        pairs = self.manager.swap_out(name, length)
        if self.num_blocks(length) > len(self.cpu_blocks) - len(used):
            assert pairs is None
            self.check_unchanged(before)
            return
        assert pairs is not None
        assert [gpu for gpu, _ in pairs] == sequence.table[: self.num_blocks(length)]
        targets = [cpu for _, cpu in pairs]
        assert len(set(targets)) == len(targets) and set(targets) <= self.cpu_blocks - used
        for gpu, cpu in pairs:
            self.cpu_content[cpu] = self.content[gpu]
        self.sequences[name] = ModelSequence(sequence.tokens, targets, swapped=True)

    @rule(index=INDEX, more=st.integers(0, 1), reserve=st.sampled_from([0, 0, 2]))
    def swap_in(self, index: int, more: int, reserve: int) -> None:
        name = self.pick(index, swapped=True)
        if name is None:
            return
        sequence = self.sequences[name]
        tokens = sequence.tokens + [0] * more
        needed = self.num_blocks(len(tokens))
        before = self.snapshot()
        pairs = self.manager.swap_in(name, len(tokens), reserve=reserve)
        if needed + reserve > self.num_free():
            assert pairs is None
            self.check_unchanged(before)
            return
        assert pairs is not None
        table = self.manager.table(name)
        assert len(table) == needed
        assert [gpu for gpu, _ in pairs] == table[: len(pairs)]
        assert [cpu for _, cpu in pairs] == sequence.table
        del self.sequences[name]
        self.take(table)
        self.sequences[name] = ModelSequence(tokens, table)
        for gpu, cpu in pairs:
            self.content[gpu] = self.cpu_content[cpu]
        kept = len(pairs) * self.block_size
        for number, block in enumerate(table[: len(pairs)], 1):
            assert self.content[block] == tuple(sequence.tokens[: number * self.block_size]), "it came back changed"
        self.write(self.sequences[name], min(kept, len(sequence.tokens) - 1))

    # After every step

    @invariant()
    def integrity(self) -> None:
        self.manager.check_integrity()

    @invariant()
    def counts_follow_from_the_tables(self) -> None:
        manager = self.manager
        references = self.references()
        assert NULL_BLOCK not in references
        assert manager.num_used_blocks == len(references)
        assert manager.num_free_blocks == len(self.gpu_blocks) - len(references)
        swapped = [block for s in self.sequences.values() if s.swapped for block in s.table]
        assert len(set(swapped)) == len(swapped)
        assert manager.num_free_cpu_blocks == len(self.cpu_blocks) - len(swapped)
        assert manager.num_cached_blocks <= len(self.gpu_blocks) and (self.caching or manager.num_cached_blocks == 0)
        for name, sequence in self.sequences.items():
            assert manager.has(name) and manager.capacity(name) == len(sequence.table) * self.block_size
            if not sequence.swapped:
                assert manager.table(name) == sequence.table

    @invariant()
    def shared_blocks_are_equal_prefixes(self) -> None:
        owners: dict[int, tuple[int, ...]] = {}
        for sequence in self.sequences.values():
            if sequence.swapped:
                continue
            for index, block in enumerate(sequence.table):
                prefix = tuple(sequence.tokens[: (index + 1) * self.block_size])
                if block in owners:
                    assert owners[block] == prefix and len(prefix) == (index + 1) * self.block_size
                owners[block] = prefix
                assert self.content[block] == prefix, "a block was overwritten under its user"
        assert not set(self.loose) & set(owners)

    def teardown(self) -> None:
        """Everything given back: nothing is in use, and all of it can be had again."""
        if not hasattr(self, "manager"):
            return
        for name in list(self.sequences):
            self.manager.release(name)
        self.manager.free(self.loose)
        self.manager.check_integrity()
        assert self.manager.num_used_blocks == 0
        assert self.manager.num_free_cpu_blocks == len(self.cpu_blocks)
        assert set(self.manager.allocate(len(self.gpu_blocks))) == self.gpu_blocks
        assert self.manager.num_cached_blocks == 0, "a block that was handed out is still found in the cache"


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = STATE_MACHINE


# The user's calls, to the letter


def test_the_users_example() -> None:
    manager = BlockManager(block_size=16, num_gpu_blocks=1024, num_cpu_blocks=256)
    assert manager.can_allocate(num_blocks=4) is True
    blocks = manager.allocate(num_blocks=4)
    assert isinstance(blocks, list) and all(type(block) is int for block in blocks) and len(set(blocks)) == 4
    assert manager.num_used_blocks == 4
    assert manager.free(blocks) is None
    assert manager.num_used_blocks == 0


def test_all_blocks_of_the_user_can_be_had_and_the_null_block_comes_on_top() -> None:
    manager = BlockManager(16, 5)
    assert sorted(manager.allocate(5)) == [1, 2, 3, 4, 5]
    assert manager.can_allocate(1) is False and manager.can_allocate(0) is True


def test_too_many_blocks_says_how_many_there_are_and_what_to_change() -> None:
    manager = BlockManager(16, 5)
    manager.allocate(2)
    with pytest.raises(OutOfMemoryError, match=r"^4 KV cache blocks asked for, 3 of 5 free; .*num_gpu_blocks larger"):
        manager.allocate(4)
    assert manager.num_free_blocks == 3


@pytest.mark.parametrize("block", [0, -1, 6, 10**9])
def test_foreign_ids_are_refused_by_name(block: int) -> None:
    manager = BlockManager(16, 5)
    manager.allocate(5)
    with pytest.raises(BlockError, match=f"block {block} is not one of 1 to 5"):
        manager.free([block])
    assert manager.num_used_blocks == 5


def test_double_free() -> None:
    manager = BlockManager(16, 5)
    first, second = manager.allocate(2)
    manager.free([first])
    with pytest.raises(BlockError, match=f"block {first} is given back 1 times but has 0 users"):
        manager.free([second, first])
    assert manager.num_used_blocks == 1, "the good id of a refused call was freed"


def test_counts_below_zero() -> None:
    manager = BlockManager(16, 5)
    with pytest.raises(BlockError, match="at least 0, got -1"):
        manager.allocate(-1)
    with pytest.raises(BlockError, match="at least 0, got -1"):
        manager.can_allocate(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 0), "block_size must be at least 1, got 0"),
        ((16, 0, 0), "num_gpu_blocks must be at least 1, got 0"),
        ((16, 5, -1), "num_cpu_blocks must be at least 0, got -1"),
    ],
)
def test_constructor_bounds(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockManager(*arguments)


# What the machine shows only in passing


def cached(manager: BlockManager, name: str, tokens: list[int]) -> list[int]:
    """A sequence that came, was computed and recorded, and went. Its block table."""
    assert manager.allocate_sequence(name, tokens) is not None
    manager.cache_prefix(name, lambda start, stop: tokens[start:stop], len(tokens))
    table = manager.table(name)
    manager.release(name)
    return table


def test_a_hit_leaves_the_last_token() -> None:
    manager = BlockManager(2, 8)
    table = cached(manager, "a", [1, 2, 3, 4])
    assert manager.allocate_sequence("b", [1, 2, 3, 4]) == 2
    assert manager.table("b")[0] == table[0] and manager.table("b")[1] != table[1]
    assert manager.allocate_sequence("c", [1, 2, 3, 4, 5]) == 4
    assert manager.table("c")[:2] == table


def test_hits_are_not_evicted_to_make_room_for_the_rest() -> None:
    manager = BlockManager(2, 4)
    table = cached(manager, "a", [1, 2, 3, 4])
    assert manager.allocate_sequence("b", [1, 2, 3, 4, 5, 6, 7]) == 4
    assert manager.table("b")[:2] == table and len(set(manager.table("b"))) == 4


def test_eviction_takes_the_least_recently_used_and_the_end_of_a_prefix_first() -> None:
    manager = BlockManager(1, 4)
    old = cached(manager, "a", [1, 2])
    new = cached(manager, "b", [7, 8])
    assert manager.allocate(1) == [old[1]]
    assert manager.allocate(1) == [old[0]]
    assert manager.allocate(1) == [new[1]]


def test_blocks_without_content_go_before_cached_ones() -> None:
    manager = BlockManager(1, 4)
    table = cached(manager, "a", [1, 2])
    assert not set(manager.allocate(2)) & set(table)
    assert manager.num_cached_blocks == 2


def test_unused_hits_count_against_what_is_free() -> None:
    manager = BlockManager(1, 3)
    cached(manager, "a", [1, 2])
    assert manager.num_free_blocks == 3
    assert manager.allocate_sequence("b", [1, 2, 3], reserve=1) is None
    assert manager.allocate_sequence("b", [1, 2, 3]) == 2


def test_reading_a_table_gives_a_copy() -> None:
    manager = BlockManager(2, 4)
    manager.allocate_sequence("a", [1, 2, 3])
    manager.table("a").clear()
    assert len(manager.table("a")) == 2


def test_trim_gives_back_what_is_beyond_the_tokens() -> None:
    manager = BlockManager(2, 8)
    manager.allocate_sequence("a", [1, 2, 3])
    assert manager.grow("a", 9) is not None
    table = manager.table("a")
    manager.trim("a", 4)
    assert manager.table("a") == table[:2] and manager.num_free_blocks == 6
    manager.trim("a", 4)
    assert manager.table("a") == table[:2], "nothing was left to give back"


def test_a_recorded_block_is_never_trimmed() -> None:
    manager = BlockManager(2, 8)
    manager.allocate_sequence("a", [1, 2, 3, 4])
    manager.cache_prefix("a", lambda start, stop: [1, 2, 3, 4][start:stop], 4)
    with pytest.raises(AssertionError, match="has more tokens than 2"):
        manager.trim("a", 2)


def test_tokens_are_asked_for_once() -> None:
    """However many blocks they fill; and not at all when no block is full."""
    manager, asked = BlockManager(2, 8), []

    def tokens(start: int, stop: int) -> range:
        asked.append((start, stop))
        return range(start, stop)

    manager.allocate_sequence("a", range(7))
    manager.cache_prefix("a", tokens, 1)
    assert asked == []
    manager.cache_prefix("a", tokens, 7)
    manager.cache_prefix("a", tokens, 7)
    assert asked == [(0, 6)] and manager.num_cached_blocks == 3


def test_what_was_swapped_in_is_private() -> None:
    """Its old blocks stay in the cache for others; what it writes from now on is never theirs."""
    manager = BlockManager(2, 8, 4)
    tokens = [1, 2, 3]
    manager.allocate_sequence("a", tokens)
    manager.cache_prefix("a", lambda start, stop: tokens[start:stop], 3)
    old = manager.table("a")
    assert manager.swap_out("a", 3) == [(old[0], 0), (old[1], 1)]
    assert manager.num_used_blocks == 0 and manager.num_free_cpu_blocks == 2
    assert manager.allocate_sequence("b", tokens) == 2
    pairs = manager.swap_in("a", 4)
    assert pairs is not None and [cpu for _, cpu in pairs] == [0, 1]
    assert not set(manager.table("a")) & set(manager.table("b"))
    assert manager.num_free_cpu_blocks == 4


def test_integrity_check_notices() -> None:
    """A check that cannot fail checks nothing: every kind of damage is found."""
    damages = {
        "idle twice": lambda m: m._free.append(m._free[-1]),
        "idle and in use": lambda m: m._free.append(m.table("a")[0]),
        "null block was handed out": lambda m: m._references.__setitem__(NULL_BLOCK, 1),
        "more users than references": lambda m: m._references.__setitem__(m.table("a")[0], 1),
        "CPU blocks are lost": lambda m: m._free_cpu.pop(),
        "names a block twice": lambda m: (
            m._sequences["a"].blocks.append(m.table("a")[0]),
            m._references.__setitem__(m.table("a")[0], 3),
        ),
    }
    for message, damage in damages.items():
        manager = BlockManager(1, 8, 2)
        cached(manager, "gone", [1, 2])
        manager.allocate_sequence("a", [1, 2, 3])
        manager.allocate_sequence("b", [1, 2, 3])
        manager.check_integrity()
        damage(manager)
        with pytest.raises(AssertionError, match=message):
            manager.check_integrity()
