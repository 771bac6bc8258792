"""Runs steps on the device: a `SchedulerOutputs` in, sampled tokens out. Everything on the device happens from here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor

from mini_infer.graphs.decoder import decode_step, prefill_step
from mini_infer.graphs.kv_cache import KVCache, SwapPool
from mini_infer.graphs.params import Params
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeState, PrefillInputs
from mini_infer.step import SampledTokens, SchedulerOutputs, StepKind


class StepHandle:
    """A launched step. `result` waits for its tokens."""

    def __init__(self, token_ids: Tensor, logprobs: Tensor, num_seqs: int) -> None:
        self._done: torch.cuda.Event | None = None
        self._token_ids, self._logprobs = token_ids[:num_seqs], logprobs[:num_seqs]
        if token_ids.is_cuda:
            self._token_ids = _to_pinned(self._token_ids)
            self._logprobs = _to_pinned(self._logprobs)
            self._done = torch.cuda.Event()
            self._done.record()

    def result(self) -> SampledTokens:
        """The sampled tokens of the step's real rows (decode) or chunks (prefill)."""
        if self._done is not None:
            self._done.synchronize()
        return SampledTokens(self._token_ids.tolist(), self._logprobs.tolist())


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
    ) -> None:
        self._spec = spec
        self._params = params
        self._device = device
        self._block_size = block_size
        self._max_blocks = -(-max_model_len // block_size)
        self._kv = KVCache(spec, num_gpu_blocks, block_size, dtype, device)
        self._swap_pool = SwapPool(self._kv, num_cpu_blocks)
        self._state = DecodeState(max_num_seqs, self._max_blocks, device)
        self.off_graph_steps = 0

    @torch.inference_mode()
    def execute(self, outputs: SchedulerOutputs) -> StepHandle:
        """Launch one step. On a GPU this returns before the step has run."""
        self._swap_pool.swap_out(outputs.swap_out)
        self._swap_pool.swap_in(outputs.swap_in)
        self._state.apply(outputs.edits)
        self.off_graph_steps += self._device.type == "cuda"
        if outputs.kind is StepKind.DECODE:
            return StepHandle(*self._decode(outputs.bucket), outputs.num_seqs)
        return StepHandle(*self._prefill(outputs), outputs.num_seqs)

    def _decode(self, bucket: int) -> tuple[Tensor, Tensor]:
        rows = self._state.rows(bucket)
        token_ids, logprobs = decode_step(self._spec, self._params, self._kv, rows)
        self._state.advance(rows, token_ids)
        return token_ids, logprobs

    def _prefill(self, outputs: SchedulerOutputs) -> tuple[Tensor, Tensor]:
        inputs = PrefillInputs.pack(
            outputs.chunks,
            outputs.bucket,
            block_size=self._block_size,
            max_blocks=self._max_blocks,
            device=self._device,
        )
        token_ids, logprobs = prefill_step(self._spec, self._params, self._kv, inputs)
        indices, rows = PrefillInputs.rows_of(outputs.chunks)
        if rows:
            placed = torch.tensor([indices, rows], device=self._device)
            self._state.put_tokens(placed[1], token_ids[placed[0]])
        return token_ids, logprobs

    # Measuring, before the first request: padded rows only, which touch nothing but the null block

    def measure_decode(self, buckets: Iterable[int], *, limit_s: float) -> dict[int, float]:
        """Milliseconds of a decode step by bucket, smallest first, until ``limit_s`` seconds are spent."""
        return self._measure(buckets, self._decode, limit_s)

    def measure_prefill(self, buckets: Iterable[int], *, limit_s: float) -> dict[int, float]:
        """Milliseconds of a prefill step by bucket, smallest first, until ``limit_s`` seconds are spent."""

        def run(bucket: int) -> tuple[Tensor, Tensor]:
            return self._prefill(SchedulerOutputs(0, StepKind.PREFILL, bucket))

        return self._measure(buckets, run, limit_s)

    @torch.inference_mode()
    def measure_swap(self) -> float | None:
        """Milliseconds to bring one block back from CPU memory; None without CPU blocks."""
        num_blocks = min(8, len(self._swap_pool), self._kv.num_blocks)
        if not num_blocks:
            return None
        pairs = [(block + 1, block) for block in range(num_blocks)]
        self._swap_pool.swap_out(pairs)
        return self._time(lambda: self._swap_pool.swap_in(pairs)) / num_blocks

    @torch.inference_mode()
    def _measure(self, buckets: Iterable[int], run: Callable[[int], object], limit_s: float) -> dict[int, float]:
        costs: dict[int, float] = {}
        begun = time.perf_counter()
        for bucket in buckets:
            if costs and time.perf_counter() - begun > limit_s:
                break
            costs[bucket] = self._time(lambda bucket=bucket: run(bucket))  # type: ignore[misc]
        return costs

    def _time(self, run: Callable[[], object]) -> float:
        """Median milliseconds of three runs after a first one."""
        times = []
        for _ in range(4):
            self.synchronize()
            begun = time.perf_counter()
            run()
            self.synchronize()
            times.append((time.perf_counter() - begun) * 1e3)
        return median(times[1:])

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _to_pinned(tensor: Tensor) -> Tensor:
    """Start a copy to page-locked CPU memory; it is there once the stream has come past it."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
