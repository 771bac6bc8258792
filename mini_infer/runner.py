"""Runs steps on the device: a `SchedulerOutputs` in, sampled tokens out. Everything on the device happens from here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from mini_infer.graphs.capture import GraphSet
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeState
from mini_infer.graphs.steps import EagerSteps, Model, Steps
from mini_infer.graphs.swap_pool import make_swap_pool
from mini_infer.step import SampledTokens, SchedulerOutputs, StepKind
from mini_infer.step_timer import StepSpan

SWAP_MEASURE_BLOCKS = 64
"""Blocks to move when swapping is measured: about as many as a sequence has."""
TIMING_MS = 30.0
"""Short runs are timed over this long, up to `MOST_TIMED_RUNS` of them: their spread is a larger part of them."""
MOST_TIMED_RUNS = 16


class StepHandle:
    """A launched step. `result` waits for its tokens.

    Attributes:
        span: The step's time on the device, to be asked for after `result`; None if steps are not measured.
    """

    def __init__(self, sampled: Tensor, num_seqs: int, span: StepSpan | None = None) -> None:
        self.span = span
        self._sampled = sampled[:num_seqs]  # [num_seqs, 2] int32
        self._done: torch.cuda.Event | None = None
        if sampled.is_cuda:
            pinned = torch.empty(self._sampled.shape, dtype=torch.int32, pin_memory=True)
            self._sampled = pinned.copy_(self._sampled, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def result(self) -> SampledTokens:
        """The sampled tokens of the step's real rows (decode) or chunks (prefill)."""
        if self._done is not None:
            self._done.synchronize()
        token_ids, logprob_bits = self._sampled.t().contiguous().numpy()
        return SampledTokens(token_ids, logprob_bits.view(np.float32))


class ModelRunner:
    """The model, its KV cache and its decode state on one device.

    Args:
        spec: The model.
        params: Its weights, on the device.
        device: Where to run.
        dtype: Type of the KV cache.
        num_gpu_blocks: KV cache blocks, the null block not counted.
        num_cpu_blocks: CPU blocks for swapped sequences.
        block_size: Tokens per block.
        max_num_seqs: Rows of the decode state.
        max_model_len: Tokens of the longest sequence.
        measure_steps: Time every step on the device.

    Attributes:
        device: Where it runs.
        off_graph_steps: Steps on a GPU that were not a replay of a captured graph.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: Params,
        *,
        device: torch.device,
        dtype: torch.dtype,
        num_gpu_blocks: int,
        num_cpu_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        measure_steps: bool = False,
    ) -> None:
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self._kv = KVCache(spec, num_gpu_blocks, block_size, dtype, device)
        self._swap_pool = make_swap_pool(self._kv, num_cpu_blocks)
        self._state = DecodeState(max_num_seqs, max_blocks, device)
        self._block_size, self._max_blocks = block_size, max_blocks
        self._model = Model(spec, params, self._kv, self._state)
        self._steps: Steps = EagerSteps(self._model, block_size=block_size, max_blocks=max_blocks, device=device)
        self._captured = False
        self._measure_steps = measure_steps
        self.off_graph_steps = 0

    @torch.inference_mode()
    def capture(
        self,
        decode_sizes: Sequence[int],
        prefill_sizes: Sequence[int],
        *,
        max_chunks: int,
        progress: Callable[[], object] = lambda: None,
    ) -> GraphSet:
        """From now on every step is a replay of a captured graph. To be called once, before the first step.

        Args:
            decode_sizes: Every decode bucket that will be asked for.
            prefill_sizes: Every prefill bucket that will be asked for.
            max_chunks: Most chunks of one prefill step.
            progress: Called once for each graph that is made.

        Returns:
            The graphs.
        """
        graphs = GraphSet(
            self._model,
            decode_sizes=decode_sizes,
            prefill_sizes=prefill_sizes,
            max_chunks=max_chunks,
            block_size=self._block_size,
            max_blocks=self._max_blocks,
            device=self.device,
            progress=progress,
        )
        self._steps = graphs
        self._captured = True
        return graphs

    @torch.inference_mode()
    def prepare(self, outputs: SchedulerOutputs) -> None:
        """Move swapped blocks and edit the rows, as the step needs them. Other requests' state is at stake here too."""
        self._swap_pool.swap_out(outputs.swap_out)
        self._swap_pool.swap_in(outputs.swap_in)
        self._state.apply(outputs.edits)

    @torch.inference_mode()
    def execute(self, outputs: SchedulerOutputs) -> StepHandle:
        """Launch one step, after `prepare`. On a GPU this returns before the step has run."""
        self.off_graph_steps += self.device.type == "cuda" and not self._captured
        span = StepSpan(self.device) if self._measure_steps else None
        if outputs.kind is StepKind.PREFILL:
            sampled = self._steps.prefill(outputs.chunks, outputs.bucket)
        else:
            self._state.advanced(outputs.bucket)
            sampled = self._steps.decode(outputs.bucket)
        if span is not None:
            span.end()
        return StepHandle(sampled, outputs.num_seqs, span)

    # Measuring, before the first request: padded rows only, which touch nothing but the null block

    def measure_decode(self, buckets: Iterable[int], *, limit_s: float) -> dict[int, float]:
        """Milliseconds of a decode step by bucket, smallest first, until ``limit_s`` seconds are spent."""
        return self._measure(buckets, self._steps.decode, limit_s)

    def measure_prefill(self, buckets: Iterable[int], *, limit_s: float) -> dict[int, float]:
        """Milliseconds of a prefill step by bucket, smallest first, until ``limit_s`` seconds are spent."""
        return self._measure(buckets, lambda bucket: self._steps.prefill((), bucket), limit_s)

    @torch.inference_mode()
    def measure_swap(self) -> float | None:
        """Milliseconds to move one block one way, out and in taken together; None without CPU blocks."""
        num_blocks = min(SWAP_MEASURE_BLOCKS, len(self._swap_pool), self._kv.num_blocks)
        if not num_blocks:
            return None
        pairs = [(block + 1, block) for block in range(num_blocks)]

        def there_and_back() -> None:
            self._swap_pool.swap_out(pairs)
            self._swap_pool.swap_in(pairs)

        return self._time(there_and_back) / (2 * num_blocks)

    @torch.inference_mode()
    def _measure(self, buckets: Iterable[int], run: Callable[[int], object], limit_s: float) -> dict[int, float]:
        costs: dict[int, float] = {}
        begun = time.perf_counter()
        for bucket in buckets:
            if costs and time.perf_counter() - begun > limit_s:
                break
            costs[bucket] = self._time(partial(run, bucket))
        return costs

    def _time(self, run: Callable[[], object]) -> float:
        """Median milliseconds of the runs after a first one: three, and more of short ones."""
        times: list[float] = []
        while len(times) < 4 or (sum(times) < TIMING_MS and len(times) < MOST_TIMED_RUNS):
            self.synchronize()
            begun = time.perf_counter()
            run()
            self.synchronize()
            times.append((time.perf_counter() - begun) * 1e3)
        return median(times[1:])

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
