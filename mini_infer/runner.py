"""Runs steps on the device: a `SchedulerOutputs` in, sampled tokens out. Everything on the device happens from here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from mini_infer.exceptions import describe
from mini_infer.graphs.capture import GraphSet
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.prefill_inputs import PrefillBuffer
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeState
from mini_infer.graphs.steps import EagerSteps, Model, Steps
from mini_infer.graphs.swap_pool import make_swap_pool
from mini_infer.kernels.compile_ahead import compile_ahead
from mini_infer.measuring import long_rows, whole_prompts
from mini_infer.step import ClearRow, PrefillChunk, SampledTokens, SchedulerOutputs, StepKind
from mini_infer.step_timer import StepSpan

MEASURED_PROMPT_TOKENS = 1024
"""Most tokens of the prompts that a measured prefill step is made of: about what several prompts of a step have."""
LEAST_CONTEXT_TOKENS = 64
"""What fewer tokens of context add to a step is within what its time varies by."""
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
        self._state = DecodeState(max_num_seqs, max_blocks, spec.vocab_size, device)
        self._block_size, self._max_blocks = block_size, max_blocks
        self._max_model_len = max_model_len
        self._model = Model(spec, params, self._kv, self._state)
        self._steps: Steps = EagerSteps(self._model, block_size=block_size, max_blocks=max_blocks, device=device)
        self._captured = False
        self._measure_steps = measure_steps
        self.off_graph_steps = 0

    @torch.inference_mode()
    def compile(
        self,
        decode_sizes: Sequence[int],
        prefill_sizes: Sequence[int],
        *,
        max_chunks: int,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> None:
        """Compile the kernels of these steps, many at a time. Without it each is compiled when it is first launched.

        It covers the steps as they are captured, and the largest prefill step as `measure_prefill` runs it op by op.

        Args:
            decode_sizes: Decode buckets.
            prefill_sizes: Prefill buckets.
            max_chunks: Most chunks of one prefill step.
            progress: As `compile_ahead` calls it.
        """
        # What is not our kernels' work is done: copies of the inputs, products, lookups. What our kernels would have
        # written is then whatever was in that memory. Nothing takes it for an index or a length: lookups go by the
        # inputs, which are padding. And nothing of it stays, but for token ids in the spare row, which nobody reads.
        model = self._model.few_layers()
        with compile_ahead(progress):
            for bucket in prefill_sizes:
                buffer = PrefillBuffer(
                    bucket,
                    min(max_chunks, bucket),
                    block_size=self._block_size,
                    max_blocks=self._max_blocks,
                    state=self._state,
                    device=self.device,
                )
                buffer.fill(())
                model.run_prefill(buffer.inputs)
            steps = EagerSteps(model, block_size=self._block_size, max_blocks=self._max_blocks, device=self.device)
            steps.prefill(self._prompts(max(prefill_sizes), max_chunks), max(prefill_sizes))
            for bucket in decode_sizes:
                steps.decode(bucket)

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

    # Measuring, before the first request: every row is padding before and after. What is left in the blocks is no
    # more than what one who had them before leaves there: nobody reads it.

    @torch.inference_mode()
    def measure_decode(self, buckets: Iterable[int], *, limit_s: float) -> dict[int, float]:
        """Milliseconds of a decode step over rows without context.

        Args:
            buckets: What to measure, in this order.
            limit_s: No more are begun after so many seconds.
        """
        return self._measure(buckets, lambda bucket: partial(self._steps.decode, bucket), limit_s)

    @torch.inference_mode()
    def measure_prefill(self, buckets: Iterable[int], *, max_chunks: int, limit_s: float) -> dict[int, float]:
        """Milliseconds of a prefill step over whole prompts, with padding where blocks or chunks do not suffice.

        Args:
            buckets: What to measure, in this order.
            max_chunks: Most chunks of one step.
            limit_s: No more are begun after so many seconds.
        """

        def step(bucket: int) -> Callable[[], object]:
            return partial(self._steps.prefill, self._prompts(bucket, max_chunks), bucket)

        return self._measure(buckets, step, limit_s)

    @torch.inference_mode()
    def measure_context(self, bucket: int, *, max_rows: int, num_tokens: int) -> float:
        """Milliseconds that each token of the rows' contexts adds to a decode step, which reads its K/V.

        With a window in every layer, those that no layer attends to are not counted.

        Args:
            bucket: The step to run.
            max_rows: Most rows to give a context, up to ``bucket``; the others stay padding.
            num_tokens: Tokens of all contexts together; there are fewer where blocks do not suffice.

        Returns:
            0 if there is no room for contexts worth measuring, or if they made no difference.
        """
        rows = long_rows(
            max_rows,
            num_tokens,
            ahead=MOST_TIMED_RUNS,  # each run makes the rows one token longer
            max_blocks=self._max_blocks,
            num_blocks=self._kv.num_blocks,
            block_size=self._block_size,
        )
        window = self._model.spec.longest_window
        context = sum(min(row.seq_len, window) if window else row.seq_len for row in rows)
        if context < LEAST_CONTEXT_TOKENS:
            return 0.0
        step = partial(self._steps.decode, bucket)
        without = self._time(step)
        self._state.apply(rows)
        with_context = self._time(step)
        self._state.apply([ClearRow(row.row) for row in rows])
        return max(0.0, with_context - without) / context

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

    def _prompts(self, bucket: int, max_chunks: int) -> tuple[PrefillChunk, ...]:
        """What a prefill step is measured on."""
        return whole_prompts(
            bucket,
            longest=min(self._max_model_len - 1, MEASURED_PROMPT_TOKENS),
            num_blocks=self._kv.num_blocks,
            block_size=self._block_size,
            max_chunks=min(max_chunks, bucket),
        )

    def _measure(
        self, buckets: Iterable[int], step: Callable[[int], Callable[[], object]], limit_s: float
    ) -> dict[int, float]:
        costs: dict[int, float] = {}
        begun = time.perf_counter()
        for bucket in buckets:
            if costs and time.perf_counter() - begun > limit_s:
                break
            costs[bucket] = self._time(step(bucket))
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

    def fault(self) -> str | None:
        """What the device died of, once nothing runs on it any more; None while it is well. Waits until it is idle.

        After an error in a kernel every further call fails, whatever it asks for, until the process ends.
        """
        try:
            self.synchronize()
        except RuntimeError as error:
            return describe(error)
        return None

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def give_back_memory() -> None:
    """Return to the GPU, where there is one, what PyTorch's allocator keeps and nobody uses."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
