"""From a configuration to the parts of a running engine, every phase timed."""

from __future__ import annotations

import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mini_infer.buckets import BucketTable
from mini_infer.builder import GRAPH_MARGIN, RunnerBuilder, StepMemory
from mini_infer.cache import cache_folder
from mini_infer.config import EngineConfig
from mini_infer.device_memory import divide_memory
from mini_infer.exceptions import ConfigError, MiniInferError, ModelNotFoundError, OutOfMemoryError, describe
from mini_infer.graphs.params import Params
from mini_infer.loader import ModelFiles, find_model, load_params, read_model_files
from mini_infer.machine_plan import MachinePlan, PlanStore
from mini_infer.memory.plan import GIB, MemoryPlan
from mini_infer.metrics import PhaseClock, StartupReport
from mini_infer.runner import ModelRunner, give_back_memory
from mini_infer.scheduler import Scheduler
from mini_infer.shape import Shape, choose_device, log_dtype
from mini_infer.start_lock import one_start_at_a_time
from mini_infer.step import CaptureRecord, StepKind
from mini_infer.tokenizer import Tokenizer, check_tokenizer

logger = logging.getLogger(__name__)


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
    except MiniInferError:
        raise
    except MemoryError as error:
        raise OutOfMemoryError(
            f"the CPU's memory does not hold what is kept of each sequence ({describe(error)}); lower max_num_seqs="
            f"{config.max_num_seqs} or max_model_len"
        ) from error


def _assemble(config: EngineConfig) -> EngineParts:
    clock = PhaseClock()
    choose_device(config.device)  # before anything is fetched
    files = read_model_files(
        find_model(config.model, weights=config.load_format != "dummy", code=config.trust_remote_code)
    )
    shape = Shape.of(config, files.spec)
    log_dtype(shape)
    clock.mark("config")
    with one_start_at_a_time(shape.device):
        clock.mark("waiting")
        return _build(shape, files, clock)


def _build(shape: Shape, files: ModelFiles, clock: PhaseClock) -> EngineParts:
    config = shape.config
    give_back_memory()  # what an engine before this one left would be counted as weights
    before = _reserved(shape.device)  # by another engine of this process
    params, tokenizer = _load(shape, files, clock)
    builder = RunnerBuilder(shape, params)
    stored = load_machine_plan(shape)
    memory, weights = StepMemory(), 0
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()
        weights = _reserved(shape.device) - before  # what the allocator rounds up is gone, too
        memory = builder.measure_memory() if stored is None else StepMemory(stored.workspace_bytes, stored.graph_bytes)
    plan = divide_memory(
        shape,
        weights=weights,
        workspace=memory.workspace,
        graphs=memory.graphs,
        held=_reserved(shape.device) - before,
    )
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
        keep(shape, machine_plan)
    elif stored is not None and graphs is not None:
        graph_bytes = revised(stored.graph_bytes, graphs.bytes)
        if graph_bytes != stored.graph_bytes:
            keep(shape, replace(stored, graph_bytes=graph_bytes))
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
        is_folder = named.is_dir()  # then no config.json is needed
        folder = named if is_folder else find_model(config.tokenizer, weights=False, code=config.trust_remote_code)
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


def keep(shape: Shape, plan: MachinePlan) -> None:
    """Keep what was measured for the next start, on a GPU. If that cannot be, the engine starts all the same."""
    if shape.device.type != "cuda":
        return
    try:
        logger.info("kept what was measured in %s", machine_plans().save(shape.plan_key(), plan))
    except ConfigError as error:
        logger.warning("what was measured is not kept, and the next start measures it again: %s", error)


def _reserved(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch's allocator holds in this process."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def revised(stored: int, measured: int) -> int:
    """What the next start is to set aside for graphs, in bytes, when an earlier one measured ``stored``.

    Both are differences of what was free on the GPU. If another process took or freed memory just then they are off, so
    neither the larger nor the smaller is believed for good.
    """
    return measured if measured > stored or measured < stored - GRAPH_MARGIN else stored


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
