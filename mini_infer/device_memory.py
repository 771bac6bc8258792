"""How an engine divides the memory of its device: what there is, what it may use of it, what the KV cache gets."""

from __future__ import annotations

import torch

from mini_infer.builder import GRAPH_MARGIN
from mini_infer.config import EngineConfig
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import token_counts_bytes
from mini_infer.graphs.swap_pool import staging_bytes
from mini_infer.memory.cpu import free_cpu_memory
from mini_infer.memory.plan import CONTEXT_BYTES, GIB, MemoryPlan, gpu_budget, plan_memory
from mini_infer.shape import Shape, log_dtype

CPU_KV_SHARE = 0.25
"""A CPU's memory is shared with everything else: the KV cache takes this much of what is free, at most."""


def divide_memory(shape: Shape, *, weights: int, workspace: int, graphs: int, held: int = 0) -> MemoryPlan:
    """The memory plan of a model on its device, as full as that is now.

    Args:
        shape: Model, options and device.
        weights, workspace, graphs: What these take, in bytes.
        held: Bytes that the engine holds on a GPU already.

    Raises:
        OutOfMemoryError: not even one sequence of ``max_model_len`` fits.
    """
    config, device = shape.config, shape.device
    block_bytes = shape.spec.kv_bytes_per_token(shape.dtype.itemsize) * config.block_size
    most_blocks = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget, others = gpu_budget(total=total, free=free, held=held, utilization=config.gpu_memory_utilization)
        name = torch.cuda.get_device_name(device)
        if others > CONTEXT_BYTES:
            name += f" ({others / GIB:.2f} GiB held by others)"
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
