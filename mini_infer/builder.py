"""Makes the runner of one model and configuration, and measures what the scheduler and the memory plan need to know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from tqdm import tqdm

from mini_infer.buckets import DENSE_DECODE, BucketTable
from mini_infer.graphs.capture import GraphSet
from mini_infer.graphs.params import Params
from mini_infer.kernels.common import INTERPRET
from mini_infer.machine_plan import MachinePlan, worthwhile
from mini_infer.memory.plan import MemoryPlan
from mini_infer.runner import ModelRunner
from mini_infer.shape import Shape
from mini_infer.step import CaptureRecord, StepKind

EAGER_MEASURE_SECONDS = 0.5
CAPTURED_MEASURE_SECONDS = 4.0
"""Time to spend on measuring the buckets of one kind of step; sizes not reached are interpolated. Captured steps are
measured once for each machine, and buckets are dropped by what is found; eager ones are measured at every start."""
CONTEXT_ROWS, CONTEXT_TOKENS = 64, 64 * 1024
"""What the cost of context is measured on: most rows, and tokens of all of them. They hold several GB of K/V, of which
no cache of a GPU keeps a part worth mention, and take some milliseconds to read."""
CPU_CONTEXT_ROWS, CPU_CONTEXT_TOKENS = 2, 2 * 512
"""On a CPU a token of context costs a greater part of a step, and a step takes long."""
TRIAL_GRAPHS = 6
"""Graphs of each kind in the trial capture: a driver hands out memory in pieces that hold several small graphs."""
GRAPH_MARGIN = 64 << 20
"""Bytes on top of what graphs were measured to take: fragmentation differs from start to start."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What steps take beside weights and KV cache, in bytes.

    Attributes:
        workspace: The most that one step allocates when it runs by itself.
        graphs: All graphs together.
        loaded: What measuring left behind for good: kernels that were loaded, the libraries' handles.
    """

    workspace: int = 0
    graphs: int = 0
    loaded: int = 0


class RunnerBuilder:
    """Makes runners of one model that differ only in the size of the KV cache.

    Args:
        shape: Model, options and device.
        params: The weights, on the device.
    """

    def __init__(self, shape: Shape, params: Params) -> None:
        self._shape = shape
        self._params = params

    def build(self, num_gpu_blocks: int, num_cpu_blocks: int) -> ModelRunner:
        """A runner with a KV cache of ``num_gpu_blocks`` blocks."""
        shape = self._shape
        return ModelRunner(
            shape.spec,
            self._params,
            device=shape.device,
            dtype=shape.dtype,
            num_gpu_blocks=num_gpu_blocks,
            num_cpu_blocks=num_cpu_blocks,
            block_size=shape.config.block_size,
            max_num_seqs=shape.config.max_num_seqs,
            max_model_len=shape.max_model_len,
            measure_steps=shape.config.measure_steps,
        )

    def capture(self, runner: ModelRunner, decode_sizes: Sequence[int], prefill_sizes: Sequence[int]) -> GraphSet:
        """Capture the steps of a runner, with a progress bar."""
        config = self._shape.config
        hidden = None if config.progress else True
        with tqdm(total=len(decode_sizes) + len(prefill_sizes), desc="graphs", unit="graph", disable=hidden) as bar:
            return runner.capture(decode_sizes, prefill_sizes, max_chunks=config.max_prefill_seqs, progress=bar.update)

    def measure_memory(self) -> StepMemory:
        """What the steps will take: the largest ones run once, and some graphs of every size are captured on trial."""
        shape, device = self._shape, self._shape.device
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        trial = self.build(num_gpu_blocks=1, num_cpu_blocks=0)
        if not INTERPRET:
            self._compile(trial)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        trial.measure_prefill(shape.prefill_sizes[-1:], max_chunks=shape.config.max_prefill_seqs, limit_s=0)
        trial.measure_decode(shape.decode_sizes[-1:], limit_s=0)
        workspace = torch.cuda.max_memory_allocated(device) - before
        graphs = self._estimate_graphs(trial) if shape.captures else 0
        del trial
        torch.cuda.empty_cache()
        left, _ = torch.cuda.mem_get_info(device)
        return StepMemory(workspace, graphs, loaded=max(0, free - left))

    def _compile(self, trial: ModelRunner) -> None:
        """Compile the kernels of all steps, with a progress bar. It takes no memory that it does not give back."""
        shape, config = self._shape, self._shape.config
        with tqdm(desc="kernels", unit="kernel", disable=None if config.progress else True) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            trial.compile(shape.decode_sizes, shape.prefill_sizes, max_chunks=config.max_prefill_seqs, progress=show)
        torch._C._cuda_clearCublasWorkspaces()  # they are part of what the first step is found to take
        torch.cuda.empty_cache()

    def _estimate_graphs(self, trial: ModelRunner) -> int:
        shape = self._shape
        graphs = trial.capture(
            evenly(shape.decode_sizes, TRIAL_GRAPHS),
            evenly(shape.prefill_sizes, TRIAL_GRAPHS),
            max_chunks=shape.config.max_prefill_seqs,
        )
        num_graphs = {StepKind.DECODE: len(shape.decode_sizes), StepKind.PREFILL: len(shape.prefill_sizes)}
        return extrapolate_bytes(graphs.ledger, graphs.bytes, num_graphs)

    @property
    def blocks_to_measure(self) -> int:
        """KV cache blocks that measuring makes use of, at most: steps over fewer of them seem cheaper than they are."""
        shape = self._shape
        prompts = -(-shape.max_prefill_tokens // shape.config.block_size) + shape.config.max_prefill_seqs
        return max(prompts, CONTEXT_TOKENS // shape.config.block_size + 2 * CONTEXT_ROWS)

    def covers(self, stored: MachinePlan, plan: MemoryPlan) -> bool:
        """Whether what was measured on an earlier start says all that this one must know, with its memory plan."""
        knows_swap = stored.swap_ms_per_block is not None or not plan.num_cpu_blocks
        return knows_swap and stored.measured_blocks >= min(plan.num_gpu_blocks, self.blocks_to_measure)

    def measure_costs(
        self, runner: ModelRunner, memory: StepMemory, graphs: GraphSet | None, num_gpu_blocks: int
    ) -> MachinePlan:
        """Time the buckets. Of captured ones, those that do not earn their place are dropped, if no user listed them.

        Args:
            runner: Where to run them.
            memory: What the steps take, as measured.
            graphs: The captured steps; None if there are none.
            num_gpu_blocks: Blocks of the runner's KV cache.
        """
        shape = self._shape
        decode_ms, prefill_ms = self._time_buckets(runner, graphs is not None)
        decode_sizes, prefill_sizes = shape.decode_sizes, shape.prefill_sizes
        graph_bytes = 0
        if graphs is not None:
            if shape.config.decode_buckets is None:  # small batches keep their own: there latency is all that counts
                earned = worthwhile(BucketTable(decode_sizes, decode_sizes[-1], decode_ms).costs)
                decode_sizes = tuple(size for size in decode_sizes if size <= DENSE_DECODE or size in earned)
            if shape.config.prefill_buckets is None:
                prefill_sizes = worthwhile(BucketTable(prefill_sizes, prefill_sizes[-1], prefill_ms).costs)
            dropped = graphs.keep(StepKind.DECODE, decode_sizes) + graphs.keep(StepKind.PREFILL, prefill_sizes)
            graph_bytes = memory.loaded + graphs.bytes - sum(record.bytes for record in dropped)
        return MachinePlan(
            workspace_bytes=memory.workspace,
            graph_bytes=graph_bytes,
            decode_sizes=decode_sizes,
            prefill_sizes=prefill_sizes,
            decode_ms=decode_ms,
            prefill_ms=prefill_ms,
            swap_ms_per_block=runner.measure_swap(),
            context_ms_per_token=self._measure_context(runner, decode_sizes),
            measured_blocks=min(num_gpu_blocks, self.blocks_to_measure),
        )

    def _time_buckets(self, runner: ModelRunner, captured: bool) -> tuple[dict[int, float], dict[int, float]]:
        """Milliseconds by decode bucket and by prefill bucket: those that time allows, spread over all sizes first."""
        measured = []
        for sizes, measure in (
            (self._shape.decode_sizes, runner.measure_decode),
            (
                self._shape.prefill_sizes,
                partial(runner.measure_prefill, max_chunks=self._shape.config.max_prefill_seqs),
            ),
        ):
            first = spread(sizes)
            if captured:
                rest = [size for size in sizes if size not in first]
                measured.append(measure([*first, *rest], limit_s=CAPTURED_MEASURE_SECONDS))
            else:
                measured.append(measure(first, limit_s=EAGER_MEASURE_SECONDS))
        return measured[0], measured[1]

    def _measure_context(self, runner: ModelRunner, decode_sizes: Sequence[int]) -> float:
        """Milliseconds that a token of context adds to a decode step, by the largest bucket that is not too large."""
        rows, tokens = CONTEXT_ROWS, CONTEXT_TOKENS
        if self._shape.device.type == "cpu":
            rows, tokens = CPU_CONTEXT_ROWS, CPU_CONTEXT_TOKENS
        bucket = max((size for size in decode_sizes if size <= rows), default=decode_sizes[0])
        return runner.measure_context(bucket, max_rows=min(bucket, rows), num_tokens=tokens)


def extrapolate_bytes(trial: Sequence[CaptureRecord], total: int, num_graphs: Mapping[StepKind, int]) -> int:
    """Bytes of all graphs, when some were captured on trial.

    The largest of each kind sets the size of the pool; each one that is still missing adds what the others of its kind
    added on average.

    Args:
        trial: The captured ones, largest first within a kind.
        total: Bytes that they took together.
        num_graphs: How many there will be of each kind.
    """
    for kind, count in num_graphs.items():
        added = [record.bytes for record in trial if record.kind is kind][1:]
        missing = count - 1 - len(added)
        if missing > 0 and added:
            total += math.ceil(fmean(added) * missing)
    return total


def evenly(sizes: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the sizes, the smallest and the largest among them, at equal distances in the list."""
    if len(sizes) <= count:
        return list(sizes)
    return [sizes[round(index * (len(sizes) - 1) / (count - 1))] for index in range(count)]


def spread(sizes: Sequence[int]) -> list[int]:
    """Sizes at least half as large again as the one before, and the last: enough to interpolate between."""
    chosen = [sizes[0]]
    for size in sizes[1:]:
        if size >= 1.5 * chosen[-1] or size == sizes[-1]:
            chosen.append(size)
    return chosen
