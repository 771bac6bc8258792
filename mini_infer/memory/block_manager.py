"""The owner of KV cache blocks: free lists, reference counts, block tables and the prefix cache. Pure Python.

Blocks of the device are numbered 1 to ``num_gpu_blocks``; block 0 is the null block, which padded rows use and nobody
is ever given. Every block is in exactly one of three states:

    free        in ``_free``: no content worth keeping
    evictable   in ``_evictable``: nobody uses it, but a later prompt may find its prefix here
    in use      reference count of at least 1; more than one sequence may read a full block of a shared prefix

Blocks in CPU memory, for swapped sequences, have numbers of their own, 0 to ``num_cpu_blocks - 1``.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mini_infer.exceptions import BlockError, ConfigError, OutOfMemoryError
from mini_infer.memory.prefix_cache import ROOT, PrefixCache
from mini_infer.typing import NULL_BLOCK, BlockTable

BlockPairs = list[tuple[int, int]]
"""(device block, CPU block) for each block that moves."""


@dataclass(slots=True)
class _Sequence:
    """Blocks of one sequence.

    ``blocks`` are device blocks, or CPU blocks while it is ``swapped``. ``num_cached`` of them are recorded in the
    prefix cache, ``entry`` being the entry of the last.
    """

    blocks: BlockTable = field(default_factory=list)
    swapped: bool = False
    num_cached: int = 0
    entry: int = ROOT


class BlockManager:
    """Hands out KV cache blocks and keeps the block table of every sequence.

    Args:
        block_size: Tokens per block.
        num_gpu_blocks: Blocks on the device that can be handed out; the null block comes on top.
        num_cpu_blocks: Blocks in CPU memory for swapped sequences.
        enable_prefix_caching: Keep the content of full blocks for later prompts that begin alike.

    Raises:
        ConfigError: a count out of bounds.
    """

    def __init__(
        self, block_size: int, num_gpu_blocks: int, num_cpu_blocks: int = 0, *, enable_prefix_caching: bool = True
    ) -> None:
        for name, value, low in (
            ("block_size", block_size, 1),
            ("num_gpu_blocks", num_gpu_blocks, 1),
            ("num_cpu_blocks", num_cpu_blocks, 0),
        ):
            if value < low:
                raise ConfigError(f"{name} must be at least {low}, got {value}")
        self.block_size = block_size
        self.num_gpu_blocks = num_gpu_blocks
        self.num_cpu_blocks = num_cpu_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._free = list(range(num_gpu_blocks, NULL_BLOCK, -1))  # a stack: warm memory is used again first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * (num_gpu_blocks + 1)  # indexed by block id
        self._free_cpu = deque(range(num_cpu_blocks))
        self._prefixes = PrefixCache(block_size)
        self._sequences: dict[str, _Sequence] = {}
        self._num_changes = 0

    # Blocks without a sequence

    @property
    def num_free_blocks(self) -> int:
        """Device blocks that can be handed out now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used_blocks(self) -> int:
        """Device blocks that somebody uses."""
        return self.num_gpu_blocks - self.num_free_blocks

    @property
    def num_free_cpu_blocks(self) -> int:
        """CPU blocks that can be handed out now."""
        return len(self._free_cpu)

    @property
    def num_cached_blocks(self) -> int:
        """Device blocks whose content a later prompt may find."""
        return len(self._prefixes)

    @property
    def num_changes(self) -> int:
        """Grows when there may be room for a sequence for which there was none: blocks came back, or were cached."""
        return self._num_changes

    def can_allocate(self, num_blocks: int) -> bool:
        """True if ``num_blocks`` device blocks can be handed out now."""
        if num_blocks < 0:
            raise BlockError(f"num_blocks must be at least 0, got {num_blocks}")
        return num_blocks <= self.num_free_blocks

    def allocate(self, num_blocks: int) -> list[int]:
        """Hand out ``num_blocks`` device blocks, each with one reference.

        Raises:
            OutOfMemoryError: fewer are free; none is taken then.
        """
        if not self.can_allocate(num_blocks):
            raise OutOfMemoryError(
                f"{num_blocks} KV cache blocks asked for, {self.num_free_blocks} of {self.num_gpu_blocks} free; "
                "free some, or make num_gpu_blocks larger"
            )
        return [self._take() for _ in range(num_blocks)]

    def free(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each of ``blocks``. Of those that stay cached, the last is evicted first.

        Raises:
            BlockError: an id is out of range or has fewer references than are given back; nothing is freed then.
        """
        blocks = list(blocks)
        for block, count in Counter(blocks).items():
            if not NULL_BLOCK < block <= self.num_gpu_blocks:
                raise BlockError(f"block {block} is not one of 1 to {self.num_gpu_blocks}")
            if self._references[block] < count:
                raise BlockError(f"block {block} is given back {count} times but has {self._references[block]} users")
        self._num_changes += bool(blocks)
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._prefixes:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    # Sequences

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take."""
        return -(-num_tokens // self.block_size)

    def table(self, sequence_id: str) -> BlockTable:
        """Block table of a sequence on the device, in token order (a copy)."""
        sequence = self._sequences[sequence_id]
        assert not sequence.swapped, f"{sequence_id} is swapped out"
        return list(sequence.blocks)

    def has(self, sequence_id: str) -> bool:
        """True if the sequence holds blocks, on the device or in CPU memory."""
        return sequence_id in self._sequences

    def capacity(self, sequence_id: str) -> int:
        """Tokens that the sequence's blocks can hold."""
        return len(self._sequences[sequence_id].blocks) * self.block_size

    def allocate_sequence(self, sequence_id: str, token_ids: Sequence[int], *, reserve: int = 0) -> int | None:
        """Give a new sequence blocks for ``token_ids``, shared ones where the prefix cache has them.

        Args:
            sequence_id: Its id; it must have no blocks yet.
            token_ids: Every token whose K/V it will compute first.
            reserve: Blocks that must stay free.

        Returns:
            How many leading tokens are in its blocks already, at most ``len(token_ids) - 1``; None if there are not
            enough blocks (nothing is taken then).
        """
        assert sequence_id not in self._sequences, f"{sequence_id} has blocks already"
        hits = self._prefixes.lookup(token_ids) if self.enable_prefix_caching else []
        num_new = self.blocks_for(len(token_ids)) - len(hits)
        unused_hits = sum(self._references[hit.block] == 0 for hit in hits)
        if num_new + unused_hits + reserve > self.num_free_blocks:
            return None
        for hit in hits:  # before any allocation, which could evict them
            self._share(hit.block)
        blocks = [hit.block for hit in hits] + self.allocate(num_new)
        entry = hits[-1].entry if hits else ROOT
        self._sequences[sequence_id] = _Sequence(blocks, num_cached=len(hits), entry=entry)
        return len(hits) * self.block_size

    def grow(self, sequence_id: str, num_tokens: int) -> list[int] | None:
        """Extend a sequence's table to hold ``num_tokens``.

        Returns:
            The blocks added, possibly none; None if there are not enough (nothing is taken then).
        """
        sequence = self._sequences[sequence_id]
        missing = max(0, self.blocks_for(num_tokens) - len(sequence.blocks))
        if not self.can_allocate(missing):
            return None
        added = self.allocate(missing)
        sequence.blocks.extend(added)
        return added

    def trim(self, sequence_id: str, num_tokens: int) -> None:
        """Give back the blocks at the end of a sequence's table that ``num_tokens`` tokens leave unused."""
        sequence = self._sequences[sequence_id]
        kept = self.blocks_for(num_tokens)
        assert kept >= sequence.num_cached, f"{sequence_id} has more tokens than {num_tokens}"
        self.free(sequence.blocks[kept:])
        del sequence.blocks[kept:]

    def cache_prefix(self, sequence_id: str, tokens: Callable[[int, int], Sequence[int]], num_tokens: int) -> None:
        """Record the full blocks among a sequence's first ``num_tokens`` tokens, whose K/V is computed.

        Args:
            sequence_id: The sequence.
            tokens: ``tokens(start, stop)`` gives its token ids in that range; called at most once.
            num_tokens: Tokens whose values are final and whose K/V is written.
        """
        if not self.enable_prefix_caching:
            return
        sequence, size = self._sequences[sequence_id], self.block_size
        start, stop = sequence.num_cached * size, num_tokens // size * size
        if stop <= start:
            return
        self._num_changes += 1
        token_ids = tokens(start, stop)
        for offset in range(0, stop - start, size):
            block = sequence.blocks[sequence.num_cached]
            sequence.entry = self._prefixes.insert(sequence.entry, token_ids[offset : offset + size], block)
            sequence.num_cached += 1

    def release(self, sequence_id: str) -> None:
        """Give back everything that a sequence holds, on the device or in CPU memory."""
        sequence = self._sequences.pop(sequence_id)
        if sequence.swapped:
            self._free_cpu.extend(sequence.blocks)
        else:
            self.free(sequence.blocks)

    def swap_out(self, sequence_id: str, num_tokens: int) -> BlockPairs | None:
        """Move a sequence's first ``num_tokens`` tokens to CPU blocks and give its device blocks back.

        Returns:
            What has to be copied, device to CPU; None if there are not enough CPU blocks (nothing changes then).
        """
        sequence = self._sequences[sequence_id]
        assert not sequence.swapped, f"{sequence_id} is swapped out already"
        num_blocks = self.blocks_for(num_tokens)
        if num_blocks > len(self._free_cpu):
            return None
        cpu_blocks = [self._free_cpu.popleft() for _ in range(num_blocks)]
        pairs = list(zip(sequence.blocks, cpu_blocks, strict=False))
        self.free(sequence.blocks)
        self._sequences[sequence_id] = _Sequence(cpu_blocks, swapped=True)
        return pairs

    def swap_in(self, sequence_id: str, num_tokens: int, *, reserve: int = 0) -> BlockPairs | None:
        """Give a swapped sequence device blocks for ``num_tokens`` tokens and its CPU blocks back.

        Its blocks are private from then on: what it had recorded in the prefix cache stays with the old blocks.

        Returns:
            What has to be copied, as (device, CPU) pairs; None if there are not enough device blocks.
        """
        sequence = self._sequences[sequence_id]
        assert sequence.swapped, f"{sequence_id} is not swapped out"
        num_blocks = max(self.blocks_for(num_tokens), len(sequence.blocks))
        if not self.can_allocate(num_blocks + reserve):
            return None
        blocks = self.allocate(num_blocks)
        pairs = list(zip(blocks, sequence.blocks, strict=False))
        self._free_cpu.extend(sequence.blocks)
        self._sequences[sequence_id] = _Sequence(blocks)
        return pairs

    def check_integrity(self) -> None:
        """Derive every invariant again from scratch. For tests and for debugging; it walks all blocks."""
        free, evictable = self._free, list(self._evictable)
        idle = set(free) | set(evictable)
        assert len(idle) == len(free) + len(evictable), "a block is idle twice"
        assert NULL_BLOCK not in idle and idle <= set(range(1, self.num_gpu_blocks + 1)), "an idle block is not ours"
        assert self._references[NULL_BLOCK] == 0, "the null block was handed out"
        for block in range(1, self.num_gpu_blocks + 1):
            assert (block in idle) == (self._references[block] == 0), f"block {block} is idle and in use, or neither"
        users = Counter(b for s in self._sequences.values() if not s.swapped for b in s.blocks)
        for block, count in users.items():
            assert count <= self._references[block], f"block {block} has more users than references"
        for block in free:
            assert block not in self._prefixes, f"free block {block} is still cached"
        for block in evictable:
            assert block in self._prefixes, f"evictable block {block} holds nothing"
        cpu_blocks = list(self._free_cpu) + [b for s in self._sequences.values() if s.swapped for b in s.blocks]
        assert sorted(cpu_blocks) == list(range(self.num_cpu_blocks)), "CPU blocks are lost or doubled"
        for sequence in self._sequences.values():
            assert len(set(sequence.blocks)) == len(sequence.blocks), "a table names a block twice"

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._prefixes.evict(block)
        self._references[block] = 1
        return block

    def _share(self, block: int) -> None:
        if self._references[block] == 0:
            del self._evictable[block]
        self._references[block] += 1
