"""From a configuration to the parts of a running engine, every phase timed."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mini_infer.buckets import BucketTable, decode_bucket_sizes, prefill_bucket_sizes
from mini_infer.config import EngineConfig
from mini_infer.exceptions import ConfigError, ModelNotFoundError
from mini_infer.graphs.capture import CaptureRecord
from mini_infer.graphs.params import Params
from mini_infer.graphs.spec import ModelSpec
from mini_infer.loader import ModelFiles, find_model, load_params, read_model_files
from mini_infer.memory.plan import GIB, MemoryPlan, plan_memory
from mini_infer.metrics import PhaseClock, StartupReport
from mini_infer.runner import ModelRunner
from mini_infer.scheduler import Scheduler
from mini_infer.step import StepKind
from mini_infer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GPU_PREFILL_TOKENS = 8192
CPU_PREFILL_TOKENS = 512
MEASURE_SECONDS = 0.5
"""Time to spend on measuring the buckets of one kind of step; sizes not reached are extrapolated."""
CPU_KV_SHARE = 0.25
"""A CPU's memory is shared with everything else: the KV cache takes this much of what is free, at most."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of."""

    files: ModelFiles
    tokenizer: Tokenizer | None
    runner: ModelRunner
    scheduler: Scheduler
    max_model_len: int
    plan: MemoryPlan
    report: StartupReport


def assemble(config: EngineConfig) -> EngineParts:
    """Load the model, size the memory, measure the buckets.

    Raises:
        ModelNotFoundError, UnsupportedModelError: there is no such model, or it cannot be run.
        ConfigError: options that do not fit the model or the machine.
        OutOfMemoryError: weights and one sequence of ``max_model_len`` do not fit.
    """
    clock = PhaseClock()
    device = choose_device(config.device)
    folder = find_model(config.model, weights=config.load_format != "dummy")
    files = read_model_files(folder)
    spec = files.spec
    dtype = choose_dtype(config.dtype, device, spec.dtype)
    max_model_len = choose_max_model_len(config.max_model_len, spec)
    clock.mark("config")
    tokenizer = _load_tokenizer(config, folder)
    clock.mark("tokenizer")
    params = load_params(
        files,
        dtype=dtype,
        device=device,
        # Padding sequences fill whole tables, so every slot of the last block has a position.
        max_positions=-(-max_model_len // config.block_size) * config.block_size,
        dummy_seed=config.seed if config.load_format == "dummy" else None,
        progress=config.progress,
    )
    clock.mark("weights")
    builder = _RunnerBuilder(config, spec, params, device, dtype, max_model_len)
    plan = builder.plan()
    clock.mark("memory")
    runner = builder.build(plan.num_gpu_blocks, plan.num_cpu_blocks)
    clock.mark("kv cache")
    if builder.captures:
        ledger = builder.capture(runner, builder.decode_sizes, builder.prefill_sizes)
        logger.info("captured %d graphs, %.3f GiB", len(ledger), sum(r.bytes for r in ledger) / GIB)
        clock.mark("capture")
    scheduler = _make_scheduler(config, runner, builder, plan, max_model_len)
    clock.mark("costs")
    report = clock.report()
    logger.info("%s", report.describe())
    logger.info("memory:\n%s", plan.describe())
    return EngineParts(files, tokenizer, runner, scheduler, max_model_len, plan, report)


def choose_device(name: str) -> torch.device:
    """The device to run on.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda' but PyTorch sees no GPU; use device='cpu', or install a CUDA build of PyTorch")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def choose_dtype(name: str, device: torch.device, trained: str | None) -> torch.dtype:
    """The type to compute in; a CPU always takes float32. Differences from what was asked for or trained are logged."""
    if device.type == "cpu":
        if name != "float32":
            logger.warning("dtype=%r: on a CPU the engine computes in float32 instead", name)
        return torch.float32
    if name == "float16" and trained == "bfloat16":
        logger.warning(
            "dtype='float16', but the model was trained in bfloat16, whose range is wider: large activations may "
            "overflow. dtype='bfloat16' is safer"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_max_model_len(asked: int | None, spec: ModelSpec) -> int:
    """The longest sequence.

    Raises:
        ConfigError: longer than the model was made for, or too short for a prompt token and a generated one.
    """
    if asked is None:
        return spec.max_position_embeddings
    if not 2 <= asked <= spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len must be between 2 and the model's {spec.max_position_embeddings}, got {asked}"
        )
    return asked


def _load_tokenizer(config: EngineConfig, folder: Path) -> Tokenizer | None:
    """The tokenizer; None for dummy weights of a bare shape, which then take token ids only."""
    where = folder if config.tokenizer is None else find_model(config.tokenizer, weights=False)
    try:
        return Tokenizer.from_pretrained(where, trust_remote_code=config.trust_remote_code)
    except ModelNotFoundError:
        if config.load_format != "dummy":
            raise
        return None


class _RunnerBuilder:
    """Makes runners of one model that differ only in the size of the KV cache."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        params: Params,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        self._config = config
        self._spec = spec
        self._params = params
        self._device = device
        self._dtype = dtype
        self._max_model_len = max_model_len
        self.captures = device.type == "cuda" and config.capture_graphs
        default_tokens = GPU_PREFILL_TOKENS if device.type == "cuda" else CPU_PREFILL_TOKENS
        self.max_prefill_tokens = config.max_prefill_tokens or default_tokens
        decode_sizes = config.decode_buckets or decode_bucket_sizes(config.max_num_seqs)
        prefill_sizes = config.prefill_buckets or prefill_bucket_sizes(self.max_prefill_tokens)
        self.decode_sizes = BucketTable(decode_sizes, config.max_num_seqs).sizes
        self.prefill_sizes = BucketTable(prefill_sizes, self.max_prefill_tokens).sizes

    def build(self, num_gpu_blocks: int, num_cpu_blocks: int) -> ModelRunner:
        """A runner with a KV cache of ``num_gpu_blocks`` blocks."""
        return ModelRunner(
            self._spec,
            self._params,
            device=self._device,
            dtype=self._dtype,
            num_gpu_blocks=num_gpu_blocks,
            num_cpu_blocks=num_cpu_blocks,
            block_size=self._config.block_size,
            max_num_seqs=self._config.max_num_seqs,
            max_model_len=self._max_model_len,
        )

    def capture(
        self, runner: ModelRunner, decode_sizes: Sequence[int], prefill_sizes: Sequence[int]
    ) -> list[CaptureRecord]:
        """Capture a runner's steps, with a progress bar."""
        total = len(decode_sizes) + len(prefill_sizes)
        with tqdm(total=total, desc="graphs", unit="graph", disable=None if self._config.progress else True) as bar:
            return runner.capture(
                decode_sizes, prefill_sizes, max_chunks=self._config.max_prefill_seqs, progress=bar.update
            )

    def plan(self) -> MemoryPlan:
        """Divide the device's memory, with what the weights and the largest steps were measured to take."""
        weights = workspace = graphs = 0
        if self._device.type == "cuda":
            weights = torch.cuda.memory_allocated(self._device)
            workspace = self._measure_workspace()
            graphs = self._measure_graphs() if self.captures else 0
        return divide_memory(
            self._config, self._spec, self._device, self._dtype, self._max_model_len, weights, workspace, graphs
        )

    def _measure_graphs(self) -> int:
        """Bytes that all graphs will take: the largest of each kind sets the pool, and each further one adds to it."""
        trial = self.build(num_gpu_blocks=1, num_cpu_blocks=0)
        sizes = self.decode_sizes[-2:], self.prefill_sizes[-2:]
        ledger = trial.capture(*sizes, max_chunks=self._config.max_prefill_seqs)
        count = {StepKind.DECODE: len(self.decode_sizes), StepKind.PREFILL: len(self.prefill_sizes)}
        total = sum(record.bytes for record in ledger)
        for kind in count:
            *_, further = (record.bytes for record in ledger if record.kind is kind)
            total += further * (count[kind] - len([record for record in ledger if record.kind is kind]))
        del trial
        torch.cuda.empty_cache()
        return total

    def _measure_workspace(self) -> int:
        """Bytes that the largest steps take beside weights and KV cache."""
        trial = self.build(num_gpu_blocks=1, num_cpu_blocks=0)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        trial.measure_prefill([self.max_prefill_tokens], limit_s=0)
        trial.measure_decode([self._config.max_num_seqs], limit_s=0)
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.empty_cache()
        return peak - before


def divide_memory(
    config: EngineConfig,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    weights: int,
    workspace: int,
    graphs: int,
) -> MemoryPlan:
    """The memory plan, given what weights, workspace and graphs take, in bytes.

    Raises:
        OutOfMemoryError: not even one sequence of ``max_model_len`` fits.
    """
    block_bytes = spec.kv_bytes_per_token(dtype.itemsize) * config.block_size
    most_blocks = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)  # other processes, and the CUDA context
        budget = int(total * config.gpu_memory_utilization) - others
        name = torch.cuda.get_device_name(device)
    else:
        # The weights are in memory already, so what is free does not include them.
        total = free_cpu_memory()
        share = 1.0 if config.num_gpu_blocks is not None else CPU_KV_SHARE
        budget = int(total * config.gpu_memory_utilization * share)
        most_blocks = config.max_num_seqs * -(-max_model_len // config.block_size)
        name = "the CPU (free memory)"
    num_cpu_blocks = config.num_cpu_blocks
    if num_cpu_blocks is None:
        num_cpu_blocks = int(config.swap_space_gib * GIB) // block_bytes
    return plan_memory(
        device=name,
        total=total,
        budget=budget,
        weights=weights,
        workspace=workspace,
        graphs=graphs,
        block_bytes=block_bytes,
        block_size=config.block_size,
        num_gpu_blocks=config.num_gpu_blocks,
        num_cpu_blocks=num_cpu_blocks,
        max_model_len=max_model_len,
        most_blocks=most_blocks,
    )


def estimate_plan(config: EngineConfig) -> tuple[ModelSpec, MemoryPlan]:
    """The memory plan of a model without loading it: weights by count, workspace by the widest activations.

    Raises:
        As `assemble`.
    """
    device = choose_device(config.device)
    spec = read_model_files(find_model(config.model, weights=False)).spec
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, config.dtype)
    max_model_len = choose_max_model_len(config.max_model_len, spec)
    weights = workspace = 0
    if device.type == "cuda":
        weights = spec.num_parameters() * dtype.itemsize
        widest = 3 * spec.hidden_size + 3 * spec.intermediate_size + spec.q_size
        activations = (config.max_prefill_tokens or GPU_PREFILL_TOKENS) * widest * dtype.itemsize
        logits = config.max_num_seqs * spec.vocab_size * (dtype.itemsize + 4)
        workspace = activations + logits
    return spec, divide_memory(config, spec, device, dtype, max_model_len, weights, workspace, graphs=0)


def _make_scheduler(
    config: EngineConfig, runner: ModelRunner, builder: _RunnerBuilder, plan: MemoryPlan, max_model_len: int
) -> Scheduler:
    decode_costs = prefill_costs = swap_ms = None
    if config.measure_costs:
        decode_costs = runner.measure_decode(_spread(builder.decode_sizes), limit_s=MEASURE_SECONDS)
        prefill_costs = runner.measure_prefill(_spread(builder.prefill_sizes), limit_s=MEASURE_SECONDS)
        swap_ms = runner.measure_swap()
    return Scheduler(
        config.max_num_seqs,
        max_model_len,
        config.block_size,
        num_gpu_blocks=plan.num_gpu_blocks,
        num_cpu_blocks=plan.num_cpu_blocks,
        decode_buckets=BucketTable(builder.decode_sizes, config.max_num_seqs, decode_costs),
        prefill_buckets=BucketTable(builder.prefill_sizes, builder.max_prefill_tokens, prefill_costs),
        max_prefill_seqs=config.max_prefill_seqs,
        prefill_share=config.prefill_share,
        preemption=config.preemption,
        swap_ms_per_block=swap_ms,
        enable_prefix_caching=config.enable_prefix_caching,
    )


def _spread(sizes: tuple[int, ...]) -> list[int]:
    """Sizes at least half as large again as the one before: enough to interpolate between."""
    chosen = [sizes[0]]
    for size in sizes[1:]:
        if size >= 1.5 * chosen[-1] or size == sizes[-1]:
            chosen.append(size)
    return chosen


def free_cpu_memory() -> int:
    """Bytes of memory that a new allocation can have without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
