"""The captured steps: one CUDA graph for every bucket, in one memory pool, with what each cost to make."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mini_infer.exceptions import ConfigError
from mini_infer.graphs.prefill_inputs import PrefillBuffer
from mini_infer.graphs.state import DecodeState
from mini_infer.graphs.steps import Model
from mini_infer.step import CaptureRecord, PrefillChunk, StepKind


class GraphSet:
    """Every step as a replay. Owns the graphs and their memory pool.

    First every step runs once outside a graph, on a few layers, so that nothing is compiled, loaded or set up while
    capturing; the memory of these runs is given back. Then the graphs are captured largest first: no step keeps more
    than its tokens, so the smaller ones find their memory in the pool already. All of it runs on padded rows and
    padding tokens, which touch nothing but the null block.

    The workspaces that cuBLAS keeps for a stream are made anew while capturing, so that they come out of the graphs'
    pool and live as long as it does: those made outside could be taken away by whoever clears them next.

    Args:
        model: The model and its memory, whose addresses the graphs bake in.
        decode_sizes: Decode buckets.
        prefill_sizes: Prefill buckets.
        max_chunks: Most chunks of one prefill step.
        block_size: Tokens per KV cache block.
        max_blocks: Blocks of the longest sequence.
        device: The GPU.
        progress: Called once for each graph that is made.

    Attributes:
        ledger: What each graph cost to make, in the order of capture.
        bytes: Device memory that is gone since before: graphs, their pool, and the kernels that were loaded for them.
    """

    def __init__(
        self,
        model: Model,
        *,
        decode_sizes: Sequence[int],
        prefill_sizes: Sequence[int],
        max_chunks: int,
        block_size: int,
        max_blocks: int,
        device: torch.device,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[tuple[StepKind, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.ledger: list[CaptureRecord] = []
        torch.cuda.empty_cache()
        free = self._free_bytes()
        self._buffers = _prefill_buffers(
            prefill_sizes,
            max_chunks,
            block_size=block_size,
            max_blocks=max_blocks,
            state=model.state,
            device=device,
        )
        steps = [(StepKind.PREFILL, bucket) for bucket in self._buffers]
        steps += [(StepKind.DECODE, bucket) for bucket in sorted(decode_sizes, reverse=True)]
        # What was written on the default stream must be there before the side stream reads it.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream), _no_garbage_collection():
            warm_up_seconds = self._warm_up(model.few_layers(), steps)
            _clear_workspaces()
            for kind, bucket in steps:
                self._capture(model, kind, bucket, warm_up_seconds[kind, bucket])
                progress()
        _clear_workspaces()
        self.bytes = max(0, free - self._free_bytes())

    def sizes(self, kind: StepKind) -> frozenset[int]:
        """The buckets that have a graph."""
        return frozenset(bucket for graph_kind, bucket in self._graphs if graph_kind is kind)

    def keep(self, kind: StepKind, sizes: Collection[int]) -> list[CaptureRecord]:
        """Drop the graphs of all other buckets of this kind. Returns the records of those."""
        dropped = [record for record in self.ledger if record.kind is kind and record.bucket not in sizes]
        for record in dropped:
            del self._graphs[kind, record.bucket]
            self.ledger.remove(record)
        return dropped

    def decode(self, bucket: int) -> Tensor:
        """One token for rows 0 to ``bucket - 1``."""
        graph, sampled = self._graph(StepKind.DECODE, bucket)
        graph.replay()
        return sampled

    def prefill(self, chunks: Sequence[PrefillChunk], bucket: int) -> Tensor:
        """Compute chunks of prompts; a sampled token goes to its chunk's row."""
        graph, sampled = self._graph(StepKind.PREFILL, bucket)
        self._buffers[bucket].fill(chunks)
        graph.replay()
        return sampled

    def _graph(self, kind: StepKind, bucket: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        entry = self._graphs.get((kind, bucket))
        if entry is None:
            raise ConfigError(f"no graph for {kind.value} bucket {bucket}; there are {sorted(self.sizes(kind))}")
        return entry

    def _warm_up(self, model: Model, steps: Sequence[tuple[StepKind, int]]) -> dict[tuple[StepKind, int], float]:
        """Run every step once. Returns the seconds that each took."""
        seconds = {}
        for kind, bucket in steps:
            begun = time.perf_counter()
            if kind is StepKind.PREFILL:
                self._buffers[bucket].fill(())
            self._run(model, kind, bucket)
            torch.cuda.synchronize(self._device)
            seconds[kind, bucket] = time.perf_counter() - begun
        return seconds

    def _capture(self, model: Model, kind: StepKind, bucket: int, warm_up_seconds: float) -> None:
        begun = time.perf_counter()
        free = self._free_bytes()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        sampled = self._run(model, kind, bucket)
        graph.capture_end()
        self._graphs[kind, bucket] = graph, sampled
        seconds = warm_up_seconds + time.perf_counter() - begun
        self.ledger.append(CaptureRecord(kind, bucket, seconds, max(0, free - self._free_bytes())))

    def _run(self, model: Model, kind: StepKind, bucket: int) -> Tensor:
        if kind is StepKind.PREFILL:
            return model.run_prefill(self._buffers[bucket].inputs)
        return model.run_decode(bucket)

    def _free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return free


def _prefill_buffers(
    sizes: Sequence[int],
    max_chunks: int,
    *,
    block_size: int,
    max_blocks: int,
    state: DecodeState,
    device: torch.device,
) -> dict[int, PrefillBuffer]:
    """A buffer for each prefill bucket, largest first, all in the memory of the largest: steps follow each other on the
    stream, and each is filled in just before it runs."""
    buffers: dict[int, PrefillBuffer] = {}
    storage = None
    for bucket in sorted(sizes, reverse=True):
        buffers[bucket] = PrefillBuffer(
            bucket,
            min(max_chunks, bucket),
            block_size=block_size,
            max_blocks=max_blocks,
            state=state,
            device=device,
            storage=storage,
        )
        storage = storage if storage is not None else buffers[bucket].storage
    return buffers


def _clear_workspaces() -> None:
    """Forget cuBLAS's workspaces, and give what is free back to the GPU."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collections take a good part of the time that capturing takes, and must free no graph or tensor under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
