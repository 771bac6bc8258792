"""From a configuration to the parts of a running engine, every phase timed."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mini_infer.buckets import BucketTable
from mini_infer.builder import GPU_PREFILL_TOKENS, RunnerBuilder, Shape
from mini_infer.cache import cache_folder
from mini_infer.config import EngineConfig
from mini_infer.exceptions import ConfigError, ModelNotFoundError, OutOfMemoryError
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.swap_pool import staging_bytes
from mini_infer.loader import ModelFiles, find_model, load_params, read_model_files
from mini_infer.machine_plan import MachinePlan, PlanStore
from mini_infer.memory.plan import GIB, MemoryPlan, plan_memory
from mini_infer.metrics import PhaseClock, StartupReport
from mini_infer.runner import ModelRunner
from mini_infer.scheduler import Scheduler
from mini_infer.step import CaptureRecord
from mini_infer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CPU_KV_SHARE = 0.25
"""A CPU's memory is shared with everything else: the KV cache takes this much of what is free, at most."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of.

    Attributes:
        files: The model's folder and spec.
        tokenizer: None for dummy weights of a bare shape.
        runner: The model on the device.
        scheduler: Decides the steps.
        shape: Model, options and device together.
        plan: Where the memory goes.
        graphs: What each captured graph cost to make.
        plan_loaded: True if nothing was measured, because an earlier start had.
        report: How long each phase took.
    """

    files: ModelFiles
    tokenizer: Tokenizer | None
    runner: ModelRunner
    scheduler: Scheduler
    shape: Shape
    plan: MemoryPlan
    graphs: tuple[CaptureRecord, ...]
    plan_loaded: bool
    report: StartupReport


def assemble(config: EngineConfig) -> EngineParts:
    """Load the model, size the memory, measure the buckets.

    Raises:
        ModelNotFoundError, UnsupportedModelError: there is no such model, or it cannot be run.
        ConfigError: options that do not fit the model or the machine.
        OutOfMemoryError: weights and one sequence of ``max_model_len`` do not fit.
    """
    try:
        return _assemble(config)
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())
        raise OutOfMemoryError(
            f"the GPU's memory was used up while the engine started: {reason} Take a smaller model or dtype, lower "
            "gpu_memory_utilization, max_prefill_tokens or max_num_seqs, or free memory that other processes hold"
        ) from error


def _assemble(config: EngineConfig) -> EngineParts:
    clock = PhaseClock()
    device = choose_device(config.device)
    folder = find_model(config.model, weights=config.load_format != "dummy")
    files = read_model_files(folder)
    spec = files.spec
    dtype = choose_dtype(config.dtype, device, spec.dtype)
    shape = Shape(config, spec, device, dtype, choose_max_model_len(config.max_model_len, spec))
    clock.mark("config")
    tokenizer = _load_tokenizer(config, folder)
    clock.mark("tokenizer")
    params = load_params(
        files,
        dtype=dtype,
        device=device,
        # Padding sequences fill whole tables, so every slot of the last block has a position.
        max_positions=shape.max_blocks * config.block_size,
        dummy_seed=config.seed if config.load_format == "dummy" else None,
        progress=config.progress,
    )
    clock.mark("weights")
    builder = RunnerBuilder(shape, params)
    stored = load_machine_plan(shape)
    weights = workspace = graph_bytes = 0
    if device.type == "cuda":
        weights = torch.cuda.memory_allocated(device)
        workspace, graph_bytes = (
            (stored.workspace_bytes, stored.graph_bytes) if stored is not None else builder.measure_memory()
        )
    plan = divide_memory(shape, weights=weights, workspace=workspace, graphs=graph_bytes)
    clock.mark("memory")
    runner = builder.build(plan.num_gpu_blocks, plan.num_cpu_blocks)
    clock.mark("kv cache")
    ledger = builder.capture(runner) if shape.captures else []
    clock.mark("capture")
    machine_plan = stored
    if machine_plan is None and config.measure_costs:
        machine_plan = MachinePlan(workspace, graph_bytes, *builder.measure_costs(runner))
        if device.type == "cuda":
            path = machine_plans().save(shape.plan_key(), machine_plan)
            logger.info("kept what was measured in %s", path)
    clock.mark("costs")
    scheduler = make_scheduler(shape, plan, machine_plan)
    clock.mark("scheduler")
    report = clock.report()
    logger.info("%s", report.describe())
    logger.info("memory:\n%s", plan.describe())
    return EngineParts(files, tokenizer, runner, scheduler, shape, plan, tuple(ledger), stored is not None, report)


def machine_plans() -> PlanStore:
    """Where measurements of this machine are kept."""
    return PlanStore(cache_folder() / "plans")


def load_machine_plan(shape: Shape) -> MachinePlan | None:
    """What an earlier start measured, if it fits. A CPU is measured every time: it is quick, and rarely idle."""
    if shape.device.type != "cuda" or not shape.config.measure_costs:
        return None
    return machine_plans().load(shape.plan_key())


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
    where = folder
    if config.tokenizer is not None:
        named = Path(config.tokenizer).expanduser()
        where = named if named.is_dir() else find_model(config.tokenizer, weights=False)  # no config.json is needed
    try:
        return Tokenizer.from_pretrained(where, trust_remote_code=config.trust_remote_code)
    except ModelNotFoundError:
        if config.load_format != "dummy" or config.tokenizer is not None:
            raise
        return None


def make_scheduler(shape: Shape, plan: MemoryPlan, measured: MachinePlan | None) -> Scheduler:
    """The scheduler, with the costs that were measured."""
    config = shape.config
    decode_ms = prefill_ms = swap_ms = None
    if measured is not None:
        decode_ms, prefill_ms, swap_ms = measured.decode_ms, measured.prefill_ms, measured.swap_ms_per_block
    return Scheduler(
        config.max_num_seqs,
        shape.max_model_len,
        config.block_size,
        num_gpu_blocks=plan.num_gpu_blocks,
        num_cpu_blocks=plan.num_cpu_blocks,
        decode_buckets=BucketTable(shape.decode_sizes, shape.decode_sizes[-1], decode_ms),
        prefill_buckets=BucketTable(shape.prefill_sizes, shape.prefill_sizes[-1], prefill_ms),
        max_prefill_seqs=config.max_prefill_seqs,
        prefill_share=config.prefill_share,
        preemption=config.preemption,
        swap_ms_per_block=swap_ms,
        enable_prefix_caching=config.enable_prefix_caching,
    )


def divide_memory(shape: Shape, *, weights: int, workspace: int, graphs: int) -> MemoryPlan:
    """The memory plan, given what weights, workspace and graphs take, in bytes.

    Raises:
        OutOfMemoryError: not even one sequence of ``max_model_len`` fits.
    """
    config, device = shape.config, shape.device
    block_bytes = shape.spec.kv_bytes_per_token(shape.dtype.itemsize) * config.block_size
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
        most_blocks = config.max_num_seqs * shape.max_blocks
        name = "the CPU (free memory)"
    num_cpu_blocks = config.num_cpu_blocks
    if num_cpu_blocks is None:
        num_cpu_blocks = int(config.swap_space_gib * GIB) // block_bytes
    if device.type == "cuda":
        workspace += staging_bytes(num_cpu_blocks, block_bytes)
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
        max_model_len=shape.max_model_len,
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
    shape = Shape(config, spec, device, dtype, choose_max_model_len(config.max_model_len, spec))
    weights = workspace = 0
    if device.type == "cuda":
        weights = spec.num_parameters() * dtype.itemsize
        widest = 3 * spec.hidden_size + 3 * spec.intermediate_size + spec.q_size
        activations = (config.max_prefill_tokens or GPU_PREFILL_TOKENS) * widest * dtype.itemsize
        logits = config.max_num_seqs * spec.vocab_size * (dtype.itemsize + 4)
        workspace = activations + logits
    return spec, divide_memory(shape, weights=weights, workspace=workspace, graphs=0)


def free_cpu_memory() -> int:
    """Bytes of memory that a new allocation can have without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
