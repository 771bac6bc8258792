"""Which full blocks hold which prefix. Pure Python.

The cache is a trie: an entry is one full block of tokens below the entry of the blocks before it. Its key is the
parent entry's id together with the block's own tokens, compared in full, so that two prefixes can never be taken for
each other. Entry ids are never used twice: once an entry is dropped, whatever hung below it can no longer be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0
"""The entry above the first block of every sequence."""


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """One entry: ``block`` holds the tokens of ``entry``'s key, after everything above it."""

    entry: int
    block: int


class PrefixCache:
    """Maps prefixes to blocks. It knows nothing of who uses a block; see `BlockManager`."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._next_entry = ROOT + 1
        self._entries: dict[tuple[int, tuple[int, ...]], CachedBlock] = {}
        self._key_of_block: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._key_of_block

    def lookup(self, token_ids: Sequence[int]) -> list[CachedBlock]:
        """The longest run of cached blocks that ``token_ids`` begins with, at least one token left over.

        The last token is never covered: its logits have to be computed.
        """
        hits: list[CachedBlock] = []
        parent = ROOT
        size = self._block_size
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            hit = self._entries.get((parent, tuple(token_ids[start : start + size])))
            if hit is None:
                break
            hits.append(hit)
            parent = hit.entry
        return hits

    def insert(self, parent: int, token_ids: Sequence[int], block: int) -> int:
        """Record that ``block`` holds ``token_ids`` below ``parent``; returns the entry for them.

        If another block holds the same prefix already, that one stays and its entry is returned.
        """
        assert len(token_ids) == self._block_size, "only full blocks are cached"
        assert block not in self._key_of_block, "a block holds one prefix"
        key = (parent, tuple(token_ids))
        new = CachedBlock(self._next_entry, block)
        cached = self._entries.setdefault(key, new)
        if cached is new:
            self._next_entry += 1
            self._key_of_block[block] = key
        return cached.entry

    def evict(self, block: int) -> None:
        """Forget what ``block`` holds. To be called before the block is written again."""
        del self._entries[self._key_of_block.pop(block)]

    def content(self, block: int) -> tuple[int, tuple[int, ...]]:
        """Parent entry and tokens of a cached block."""
        return self._key_of_block[block]
