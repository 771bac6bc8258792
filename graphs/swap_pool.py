"""Swapping: blocks of preempted sequences move to CPU memory and back.

On a GPU a block travels in two hops, each in the stream that owns its far end:

    main stream   KV cache <-> staging buffer     a copy within the device, as fast as its memory
    copy stream   staging buffer <-> CPU block    over the bus, beside the steps of the main stream

So the KV cache is touched by the main stream alone, between the steps launched before and those launched after, and
CPU memory by the copy stream alone, whose order makes a CPU block safe to use again: it is read before anything that
is launched later can overwrite it. Events pass the staging buffers back and forth; the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from mini_infer.exceptions import OutOfMemoryError, describe
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.state import to_device
from mini_infer.kernels.block_copy import gather_blocks, scatter_blocks
from mini_infer.typing import NULL_BLOCK

BlockPairs = Sequence[tuple[int, int]]
"""(device block, CPU block) for each block that moves."""

NUM_STAGES = 2
MAX_STAGE_BLOCKS = 64
MAX_STAGE_BYTES = 64 << 20


def stage_blocks(num_blocks: int, block_bytes: int) -> int:
    """Blocks of one staging buffer, for a pool of ``num_blocks`` CPU blocks of ``block_bytes`` bytes."""
    return min(num_blocks, MAX_STAGE_BLOCKS, max(1, MAX_STAGE_BYTES // block_bytes))


def staging_bytes(num_blocks: int, block_bytes: int) -> int:
    """Device memory of all staging buffers together."""
    return NUM_STAGES * stage_blocks(num_blocks, block_bytes) * block_bytes


def make_swap_pool(kv: KVCache, num_blocks: int) -> SwapPool:
    """The swap pool of a cache: with a copy stream where the cache is on a GPU."""
    return StreamSwapPool(kv, num_blocks) if kv.blocks.is_cuda else SwapPool(kv, num_blocks)


class SwapPool:
    """CPU blocks of preempted sequences, copied while the caller waits: for a cache in CPU memory.

    Args:
        kv: The cache whose blocks it saves.
        num_blocks: CPU blocks.

    Raises:
        OutOfMemoryError: the CPU's memory does not hold them.
    """

    def __init__(self, kv: KVCache, num_blocks: int) -> None:
        num_layers, two, num_kv_blocks = kv.blocks.shape[:3]
        # A part is the K or V of one layer: [num_layers * 2, num_kv_blocks, num_kv_heads * block_size * head_dim].
        self._cache = kv.blocks.view(num_layers * two, num_kv_blocks, -1)
        num_parts, _, part_size = self._cache.shape
        # A block is one contiguous piece here. Page-locked where the copies are not waited for.
        try:
            self._blocks = torch.empty(
                (num_blocks, num_parts, part_size),
                dtype=self._cache.dtype,
                pin_memory=self._cache.is_cuda and num_blocks > 0,
            )
        except RuntimeError as error:  # the allocators have no error of their own for it
            size = num_blocks * num_parts * part_size * self._cache.element_size()
            raise OutOfMemoryError(
                f"{size / (1 << 30):.2f} GiB of CPU memory for {num_blocks} swapped blocks are not to be had "
                f"({describe(error).splitlines()[0]}); lower swap_space_gib or num_cpu_blocks"
            ) from error

    def __len__(self) -> int:
        return len(self._blocks)

    def swap_out(self, pairs: BlockPairs) -> None:
        """Copy (device block, CPU block) pairs from the device, as they are after the steps launched so far.

        Where two pairs name one CPU block, the later one's content is left in it.
        """
        for device_blocks, cpu_blocks in _runs(pairs):
            gather_blocks(self._cache, torch.tensor(device_blocks), self._blocks[cpu_blocks])

    def swap_in(self, pairs: BlockPairs) -> None:
        """Copy (device block, CPU block) pairs to the device, all different there, for the steps launched from now."""
        for device_blocks, cpu_blocks in _runs(pairs):
            scatter_blocks(self._blocks[cpu_blocks], torch.tensor(device_blocks), self._cache)


@dataclass(frozen=True, slots=True)
class _Stage:
    """A staging buffer on the device, which one stream writes and the other reads, in turns.

    Attributes:
        blocks: [stage_blocks, num_parts, part_size].
        filled: Its content is there.
        emptied: Its content was read; it can be written again.
    """

    blocks: Tensor
    filled: torch.cuda.Event
    emptied: torch.cuda.Event


class StreamSwapPool(SwapPool):
    """CPU blocks of preempted sequences, copied over a stream of their own while the steps go on. As `SwapPool`."""

    def __init__(self, kv: KVCache, num_blocks: int) -> None:
        super().__init__(kv, num_blocks)
        self._device = self._cache.device
        self._copies = torch.cuda.Stream(self._device)
        num_parts, _, part_size = self._cache.shape
        self._stage_blocks = stage_blocks(num_blocks, num_parts * part_size * self._cache.element_size())
        self._stages = cycle([self._make_stage() for _ in range(NUM_STAGES)])
        if num_blocks:  # compile the kernels now, not in the middle of serving; the null block's content means nothing
            self.swap_out([(NULL_BLOCK, 0)])
            self.swap_in([(NULL_BLOCK, 0)])

    def swap_out(self, pairs: BlockPairs) -> None:
        """As `SwapPool.swap_out`. The next step may overwrite the device blocks: it waits until they are staged.

        It waits for copies over the bus only where there are more blocks than the staging buffers hold.
        """
        if not pairs:
            return
        with self._main_stream() as main:
            for batch in self._batches(pairs):
                stage = next(self._stages)
                staged = stage.blocks[: len(batch)]
                block_ids = to_device(_device_blocks(batch), self._device)
                main.wait_event(stage.emptied)
                gather_blocks(self._cache, block_ids, staged)
                stage.filled.record(main)
                with torch.cuda.stream(self._copies):
                    self._copies.wait_event(stage.filled)
                    for host, part in self._matched(batch, staged):
                        host.copy_(part, non_blocking=True)
                    stage.emptied.record(self._copies)

    def swap_in(self, pairs: BlockPairs) -> None:
        """As `SwapPool.swap_in`. The copies over the bus run beside the steps launched so far; the next one waits."""
        if not pairs:
            return
        with self._main_stream() as main:
            for batch in self._batches(pairs):
                stage = next(self._stages)
                staged = stage.blocks[: len(batch)]
                with torch.cuda.stream(self._copies):
                    self._copies.wait_event(stage.emptied)
                    for host, part in self._matched(batch, staged):
                        part.copy_(host, non_blocking=True)
                    stage.filled.record(self._copies)
                block_ids = to_device(_device_blocks(batch), self._device)
                main.wait_event(stage.filled)
                scatter_blocks(staged, block_ids, self._cache)
                stage.emptied.record(main)

    def _make_stage(self) -> _Stage:
        num_parts, _, part_size = self._cache.shape
        blocks = self._cache.new_empty((self._stage_blocks, num_parts, part_size))
        blocks.record_stream(self._copies)  # dropped while copies are on their way, it is not given to anybody else yet
        return _Stage(blocks, filled=torch.cuda.Event(), emptied=torch.cuda.Event())

    def _batches(self, pairs: BlockPairs) -> Iterator[BlockPairs]:
        """As many pairs at a time as a staging buffer holds."""
        for start in range(0, len(pairs), self._stage_blocks):
            yield pairs[start : start + self._stage_blocks]

    def _matched(self, batch: BlockPairs, staged: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What lies in one piece on both sides: (CPU blocks, their part of ``staged``)."""
        start = 0
        for device_blocks, cpu_blocks in _runs(batch):
            stop = start + len(device_blocks)
            yield self._blocks[cpu_blocks], staged[start:stop]
            start = stop

    @contextmanager
    def _main_stream(self) -> Iterator[torch.cuda.Stream]:
        """The main stream. If a swap breaks off, its sequences are lost, and a copy may be on its way in or out of a
        staging buffer with no event to tell: both streams then wait for it, so that nobody else meets it."""
        main = torch.cuda.current_stream(self._device)
        try:
            yield main
        except BaseException:
            main.wait_stream(self._copies)
            self._copies.wait_stream(main)
            raise


def _device_blocks(pairs: BlockPairs) -> np.ndarray:
    return np.array([device_block for device_block, _ in pairs], dtype=np.int64)


def _runs(pairs: BlockPairs) -> Iterator[tuple[list[int], slice]]:
    """Pairs that follow one another on the CPU: their device blocks, and the range of their CPU blocks."""
    device_blocks: list[int] = []
    start = stop = 0
    for device_block, cpu_block in pairs:
        if device_blocks and cpu_block != stop:
            yield device_blocks, slice(start, stop)
            device_blocks = []
        if not device_blocks:
            start = cpu_block
        device_blocks.append(device_block)
        stop = cpu_block + 1
    if device_blocks:
        yield device_blocks, slice(start, stop)
