"""From a configuration to the parts of a running engine, every phase timed."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mini_infer.buckets import BucketTable
from mini_infer.builder import GRAPH_MARGIN, RunnerBuilder, StepMemory
from mini_infer.cache import cache_folder
from mini_infer.config import EngineConfig
from mini_infer.exceptions import ConfigError, ModelNotFoundError, OutOfMemoryError
from mini_infer.graphs.params import Params
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import token_counts_bytes
from mini_infer.graphs.swap_pool import staging_bytes
from mini_infer.loader import ModelFiles, find_model, load_params, read_model_files
from mini_infer.machine_plan import MachinePlan, PlanStore
from mini_infer.memory.plan import GIB, MemoryPlan, plan_memory
from mini_infer.metrics import PhaseClock, StartupReport
from mini_infer.runner import ModelRunner, give_back_memory
from mini_infer.scheduler import Scheduler
from mini_infer.shape import Shape, choose_device
from mini_infer.step import CaptureRecord, StepKind
from mini_infer.tokenizer import Tokenizer, check_tokenizer

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
    choose_device(config.device)  # before anything is fetched
    files = read_model_files(find_model(config.model, weights=config.load_format != "dummy"))
    shape = Shape.of(config, files.spec)
    log_dtype(shape)
    clock.mark("config")
    give_back_memory()  # what an engine before this one left would be counted as weights
    params, tokenizer = _load(shape, files, clock)
    builder = RunnerBuilder(shape, params)
    stored = load_machine_plan(shape)
    memory, weights = StepMemory(), 0
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()
        weights = torch.cuda.memory_reserved(shape.device)  # what the allocator rounds up is gone, too
        memory = builder.measure_memory() if stored is None else StepMemory(stored.workspace_bytes, stored.graph_bytes)
    plan = divide_memory(shape, weights=weights, workspace=memory.workspace, graphs=memory.graphs)
    if stored is not None and not builder.covers(stored, plan):
        stored = None
    clock.mark("memory")
    runner = builder.build(plan.num_gpu_blocks, plan.num_cpu_blocks)
    clock.mark("kv cache")
    graphs = None
    if shape.captures:
        sizes = shape if stored is None else stored
        graphs = builder.capture(runner, sizes.decode_sizes, sizes.prefill_sizes)
        plan = with_true_graphs(plan, graphs.bytes)
    clock.mark("capture")
    machine_plan = stored
    if machine_plan is None and config.measure_costs:
        machine_plan = builder.measure_costs(runner, memory, graphs, plan.num_gpu_blocks)
        _keep(shape, machine_plan)
    elif stored is not None and graphs is not None and graphs.bytes > stored.graph_bytes:
        _keep(shape, replace(stored, graph_bytes=graphs.bytes))
    clock.mark("costs")
    scheduler = make_scheduler(shape, plan, machine_plan)
    ledger: list[CaptureRecord] = []
    if graphs is not None:
        check_coverage(StepKind.DECODE, scheduler.decode_buckets, graphs.sizes(StepKind.DECODE))
        check_coverage(StepKind.PREFILL, scheduler.prefill_buckets, graphs.sizes(StepKind.PREFILL))
        ledger = with_costs(graphs.ledger, machine_plan)
    clock.mark("scheduler")
    report = clock.report()
    logger.info("%s", report.describe())
    logger.info("memory:\n%s", plan.describe())
    return EngineParts(files, tokenizer, runner, scheduler, shape, plan, tuple(ledger), stored is not None, report)


def log_dtype(shape: Shape) -> None:
    """Say where the type is another than was asked for, or than the model was trained in."""
    asked = shape.config.dtype
    if shape.device.type == "cpu" and asked != "float32":
        logger.warning("dtype=%r: on a CPU the engine computes in float32 instead", asked)
    elif shape.dtype == torch.float16 and shape.spec.dtype == "bfloat16":
        logger.warning(
            "dtype='float16', but the model was trained in bfloat16, whose range is wider: large activations may "
            "overflow. dtype='bfloat16' is safer"
        )


def _load(shape: Shape, files: ModelFiles, clock: PhaseClock) -> tuple[Params, Tokenizer | None]:
    """The weights, and beside them the tokenizer: the library that reads it takes seconds to import."""
    config = shape.config
    folder = find_tokenizer(config, files.folder)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer") as thread:
        loading = None
        if folder is not None:
            loading = thread.submit(Tokenizer.from_pretrained, folder, trust_remote_code=config.trust_remote_code)
        params = load_params(
            files,
            dtype=shape.dtype,
            device=shape.device,
            # Padding sequences fill whole tables, so every slot of the last block has a position.
            max_positions=shape.max_blocks * config.block_size,
            dummy_seed=config.seed if config.load_format == "dummy" else None,
            progress=config.progress,
        )
        clock.mark("weights")
        tokenizer = None if loading is None else loading.result()
    clock.mark("tokenizer")
    return params, tokenizer


def find_tokenizer(config: EngineConfig, folder: Path) -> Path | None:
    """Folder of the tokenizer; None for dummy weights of a bare shape, which then take token ids only.

    Raises:
        ModelNotFoundError: there is none, or not the one that was named.
    """
    if config.tokenizer is not None:
        named = Path(config.tokenizer).expanduser()
        folder = named if named.is_dir() else find_model(config.tokenizer, weights=False)  # no config.json is needed
    try:
        check_tokenizer(folder)
    except ModelNotFoundError:
        if config.load_format != "dummy" or config.tokenizer is not None:
            raise
        return None
    return folder


def machine_plans() -> PlanStore:
    """Where measurements of this machine are kept."""
    return PlanStore(cache_folder() / "plans")


def load_machine_plan(shape: Shape) -> MachinePlan | None:
    """What an earlier start measured, if it fits. A CPU is measured every time: it is quick, and rarely idle."""
    if shape.device.type != "cuda" or not shape.config.measure_costs:
        return None
    return machine_plans().load(shape.plan_key())


def _keep(shape: Shape, plan: MachinePlan) -> None:
    """Keep what was measured for the next start, on a GPU."""
    if shape.device.type == "cuda":
        logger.info("kept what was measured in %s", machine_plans().save(shape.plan_key(), plan))


def with_true_graphs(plan: MemoryPlan, graph_bytes: int) -> MemoryPlan:
    """The plan with what the graphs turned out to take; a warning if that is more than was set aside."""
    if graph_bytes > plan.graphs:
        logger.warning(
            "the captured graphs take %.3f GiB, %.3f GiB more than was set aside for them; the engine is that much "
            "above gpu_memory_utilization",
            graph_bytes / GIB,
            (graph_bytes - plan.graphs) / GIB,
        )
    return replace(plan, graphs=graph_bytes)


def with_costs(ledger: Collection[CaptureRecord], plan: MachinePlan | None) -> list[CaptureRecord]:
    """The records with what each step was measured to cost."""
    if plan is None:
        return list(ledger)
    costs = {StepKind.DECODE: plan.decode_ms, StepKind.PREFILL: plan.prefill_ms}
    return [replace(record, step_ms=costs[record.kind].get(record.bucket)) for record in ledger]


def check_coverage(kind: StepKind, table: BucketTable, captured: Collection[int]) -> None:
    """See that every batch the scheduler may form has a graph.

    Args:
        kind: Decode or prefill.
        table: The scheduler's buckets.
        captured: Buckets that have a graph.

    Raises:
        ConfigError: there are sizes without one; the message names them.
    """
    missing = [size for size in range(1, table.largest + 1) if table.bucket(size) not in captured]
    if missing:
        buckets = sorted({table.bucket(size) for size in missing})
        raise ConfigError(
            f"no captured graph for {kind.value} steps of {_ranges(missing)}, which run in buckets {buckets}; there "
            f"are graphs for {sorted(captured)}"
        )


def _ranges(sizes: list[int]) -> str:
    """Ascending numbers for people: 1-4, 7."""
    runs: list[tuple[int, int]] = []
    for size in sizes:
        if runs and size == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], size
        else:
            runs.append((size, size))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def make_scheduler(shape: Shape, plan: MemoryPlan, measured: MachinePlan | None) -> Scheduler:
    """The scheduler, with the costs that were measured."""
    config = shape.config
    sizes = shape if measured is None else measured
    decode_ms = prefill_ms = swap_ms = None
    context_ms = 0.0
    if measured is not None:
        decode_ms, prefill_ms = measured.decode_ms, measured.prefill_ms
        swap_ms, context_ms = measured.swap_ms_per_block, measured.context_ms_per_token
    return Scheduler(
        config.max_num_seqs,
        shape.max_model_len,
        config.block_size,
        num_gpu_blocks=plan.num_gpu_blocks,
        num_cpu_blocks=plan.num_cpu_blocks,
        decode_buckets=BucketTable(sizes.decode_sizes, config.max_num_seqs, decode_ms, policy=config.bucket_policy),
        prefill_buckets=BucketTable(
            sizes.prefill_sizes, shape.max_prefill_tokens, prefill_ms, policy=config.bucket_policy
        ),
        max_prefill_seqs=config.max_prefill_seqs,
        prefill_share=config.prefill_share,
        preemption=config.preemption,
        swap_ms_per_block=swap_ms,
        enable_prefix_caching=config.enable_prefix_caching,
        context_ms_per_token=context_ms,
        attention_window=shape.spec.longest_window,
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
    if shape.captures and graphs:
        graphs += GRAPH_MARGIN
        # Steps run outside their graphs only before the first capture, and give that memory back.
        workspace = max(0, workspace - graphs)
    if device.type == "cuda":
        workspace += staging_bytes(num_cpu_blocks, block_bytes)
        workspace += token_counts_bytes(config.max_num_seqs, shape.spec.vocab_size)
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
    shape = Shape.of(config)
    log_dtype(shape)
    spec, itemsize = shape.spec, shape.dtype.itemsize
    weights = workspace = 0
    if shape.device.type == "cuda":
        weights = spec.num_parameters() * itemsize
        widest = 3 * spec.hidden_size + 3 * spec.intermediate_size + spec.q_size
        activations = shape.max_prefill_tokens * widest * itemsize
        logits = config.max_num_seqs * spec.vocab_size * (itemsize + 4)
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
