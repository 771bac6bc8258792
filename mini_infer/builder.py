"""Makes the runner of one model and configuration, and measures what the scheduler and the memory plan need to know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from tqdm import tqdm

import mini_infer
from mini_infer.buckets import BucketTable, decode_bucket_sizes, prefill_bucket_sizes
from mini_infer.config import EngineConfig
from mini_infer.graphs.params import Params
from mini_infer.graphs.spec import ModelSpec
from mini_infer.kernels.linear_plan import LinearPlan
from mini_infer.machine_plan import PlanKey
from mini_infer.runner import ModelRunner
from mini_infer.step import CaptureRecord, StepKind

GPU_PREFILL_TOKENS = 8192
CPU_PREFILL_TOKENS = 512
MEASURE_SECONDS = 0.5
"""Time to spend on measuring the buckets of one kind of step; sizes not reached are extrapolated."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the steps that an engine has, apart from the weights.

    Attributes:
        config: The engine's options.
        spec: The model.
        device: Where it runs.
        dtype: Type of weights, activations and KV cache.
        max_model_len: Most tokens of one sequence.
    """

    config: EngineConfig
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    max_model_len: int

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.config.block_size)

    @property
    def captures(self) -> bool:
        """True if the steps are captured as CUDA graphs."""
        return self.device.type == "cuda" and self.config.capture_graphs

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Decode buckets."""
        config = self.config
        return BucketTable(config.decode_buckets or decode_bucket_sizes(config.max_num_seqs), config.max_num_seqs).sizes

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Prefill buckets."""
        largest = self.config.max_prefill_tokens
        if largest is None:
            largest = GPU_PREFILL_TOKENS if self.device.type == "cuda" else CPU_PREFILL_TOKENS
        return BucketTable(self.config.prefill_buckets or prefill_bucket_sizes(largest), largest).sizes

    def plan_key(self) -> PlanKey:
        """Everything that measurements on this machine depend on."""
        config = self.config
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "spec": repr(self.spec),
            "dtype": str(self.dtype),
            "device": gpu,
            "linear_plan": hashlib.sha256(LinearPlan.for_gpu(gpu).to_json().encode()).hexdigest(),
            "cuda": str(torch.version.cuda),
            "torch": torch.__version__,
            "mini_infer": mini_infer.__version__,
            "block_size": str(config.block_size),
            "max_model_len": str(self.max_model_len),
            "max_num_seqs": str(config.max_num_seqs),
            "max_prefill_seqs": str(config.max_prefill_seqs),
            "decode_sizes": repr(self.decode_sizes),
            "prefill_sizes": repr(self.prefill_sizes),
            "captures": str(self.captures),
        }


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
        )

    def capture(self, runner: ModelRunner) -> list[CaptureRecord]:
        """Capture every step of a runner, with a progress bar."""
        return self._capture(runner, self._shape.decode_sizes, self._shape.prefill_sizes)

    def measure_memory(self) -> tuple[int, int]:
        """Bytes that the largest steps take beside weights and KV cache, and bytes that all graphs will take."""
        device = self._shape.device
        trial = self.build(num_gpu_blocks=1, num_cpu_blocks=0)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        trial.measure_prefill(self._shape.prefill_sizes[-1:], limit_s=0)
        trial.measure_decode(self._shape.decode_sizes[-1:], limit_s=0)
        workspace = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        graphs = self._estimate_graphs(trial) if self._shape.captures else 0
        del trial
        torch.cuda.empty_cache()
        return workspace, graphs

    def _estimate_graphs(self, trial: ModelRunner) -> int:
        """The largest graph of each kind sets the pool, and each further one adds what the second largest adds."""
        sizes = {StepKind.DECODE: self._shape.decode_sizes, StepKind.PREFILL: self._shape.prefill_sizes}
        ledger = self._capture(trial, sizes[StepKind.DECODE][-2:], sizes[StepKind.PREFILL][-2:], progress=False)
        total = 0
        for kind, all_sizes in sizes.items():
            captured = [record.bytes for record in ledger if record.kind is kind]
            total += sum(captured) + captured[-1] * (len(all_sizes) - len(captured))
        return total

    def _capture(
        self, runner: ModelRunner, decode_sizes: tuple[int, ...], prefill_sizes: tuple[int, ...], progress: bool = True
    ) -> list[CaptureRecord]:
        config = self._shape.config
        hidden = None if config.progress and progress else True
        with tqdm(total=len(decode_sizes) + len(prefill_sizes), desc="graphs", unit="graph", disable=hidden) as bar:
            return runner.capture(decode_sizes, prefill_sizes, max_chunks=config.max_prefill_seqs, progress=bar.update)

    def measure_costs(self, runner: ModelRunner) -> tuple[dict[int, float], dict[int, float], float | None]:
        """Milliseconds by decode bucket, by prefill bucket (some of each), and to move one block."""
        return (
            runner.measure_decode(spread(self._shape.decode_sizes), limit_s=MEASURE_SECONDS),
            runner.measure_prefill(spread(self._shape.prefill_sizes), limit_s=MEASURE_SECONDS),
            runner.measure_swap(),
        )


def spread(sizes: tuple[int, ...]) -> list[int]:
    """Sizes at least half as large again as the one before, and the last: enough to interpolate between."""
    chosen = [sizes[0]]
    for size in sizes[1:]:
        if size >= 1.5 * chosen[-1] or size == sizes[-1]:
            chosen.append(size)
    return chosen
