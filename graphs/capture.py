"""The captured steps: one CUDA graph for every bucket, in one memory pool, with what each cost to make."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mini_infer.exceptions import ConfigError
from mini_infer.graphs.prefill_inputs import PrefillBuffer
from mini_infer.graphs.steps import Model
from mini_infer.step import CaptureRecord, PrefillChunk, StepKind


class GraphSet:
    """Every step as a replay. Owns the graphs and their memory pool.

    The graphs are captured largest first, so that the smaller ones find their memory in the pool already. Before its
    capture each step runs once by itself, so that nothing is compiled or set up while capturing. Both run on padded
    rows and padding tokens, which touch nothing but the null block.

    Args:
        model: The model and its memory, whose addresses the graphs bake in.
        decode_sizes: Decode buckets.
        prefill_sizes: Prefill buckets.
        max_chunks: Most chunks of one prefill step.
        block_size: Tokens per KV cache block.
        max_blocks: Blocks of the longest sequence.
        device: The GPU.
        progress: Called once for each graph that is made.
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
        self._decode: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._prefill: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, PrefillBuffer]] = {}
        self.ledger: list[CaptureRecord] = []
        for bucket in sorted(prefill_sizes, reverse=True):
            buffer = PrefillBuffer(
                bucket,
                min(max_chunks, bucket),
                block_size=block_size,
                max_blocks=max_blocks,
                spare_row=model.state.num_rows,
                device=device,
            )
            buffer.fill(())
            graph, sampled = self._capture(StepKind.PREFILL, bucket, lambda b=buffer: model.run_prefill(b.inputs))  # type: ignore[misc]
            self._prefill[bucket] = graph, sampled, buffer
            progress()
        for bucket in sorted(decode_sizes, reverse=True):
            self._decode[bucket] = self._capture(StepKind.DECODE, bucket, lambda b=bucket: model.run_decode(b))  # type: ignore[misc]
            progress()

    def decode(self, bucket: int) -> Tensor:
        """One token for rows 0 to ``bucket - 1``."""
        entry = self._decode.get(bucket)
        if entry is None:
            raise ConfigError(f"no graph for decode bucket {bucket}; there are {sorted(self._decode)}")
        graph, sampled = entry
        graph.replay()
        return sampled

    def prefill(self, chunks: Sequence[PrefillChunk], bucket: int) -> Tensor:
        """Compute chunks of prompts; a sampled token goes to its chunk's row."""
        entry = self._prefill.get(bucket)
        if entry is None:
            raise ConfigError(f"no graph for prefill bucket {bucket}; there are {sorted(self._prefill)}")
        graph, sampled, buffer = entry
        buffer.fill(chunks)
        graph.replay()
        return sampled

    def _capture(self, kind: StepKind, bucket: int, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        begun = time.perf_counter()
        free, _ = torch.cuda.mem_get_info(self._device)
        # What was written on the default stream must be there before the side stream reads it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            run()
            torch.cuda.synchronize(self._device)
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            sampled = run()
            graph.capture_end()
        left, _ = torch.cuda.mem_get_info(self._device)
        self.ledger.append(CaptureRecord(kind, bucket, time.perf_counter() - begun, max(0, free - left)))
        return graph, sampled
