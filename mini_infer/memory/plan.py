"""Where the device's memory goes. Arithmetic only: whoever measured the parts passes them in."""

from __future__ import annotations

from dataclasses import dataclass

from mini_infer.exceptions import OutOfMemoryError

GIB = 1 << 30
CONTEXT_BYTES = 2 << 30
"""More than a process's CUDA context takes, with its libraries and kernels; it cannot be told from what others hold."""
SPARE_BYTES = 1 << 30
"""Left free on a GPU that others use as well: what they and their contexts take may still grow."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The engine's memory, in bytes.

    Attributes:
        device: What the memory belongs to, for people.
        total: All of the device's memory.
        budget: What the engine may use of it.
        weights: Parameters and RoPE tables.
        workspace: The most that a step needs beside weights, graphs and KV cache, the counts of the tokens that
            sequences have seen, and the staging buffers of swaps.
        graphs: Captured graphs, and the kernels loaded for them.
        block_bytes: One KV cache block over all layers.
        num_gpu_blocks: Blocks on the device, the null block not counted.
        num_cpu_blocks: Blocks in CPU memory for swapped sequences.
        block_size: Tokens per block.
    """

    device: str
    total: int
    budget: int
    weights: int
    workspace: int
    graphs: int
    block_bytes: int
    num_gpu_blocks: int
    num_cpu_blocks: int
    block_size: int

    @property
    def kv_cache(self) -> int:
        """Bytes of the KV cache, the null block included."""
        return (self.num_gpu_blocks + 1) * self.block_bytes

    @property
    def swap(self) -> int:
        """Bytes of CPU memory for swapped sequences."""
        return self.num_cpu_blocks * self.block_bytes

    @property
    def reserve(self) -> int:
        """What the budget leaves unused."""
        return self.budget - self.weights - self.workspace - self.graphs - self.kv_cache

    def describe(self) -> str:
        """A small table for people. What takes nothing, or is not counted, is left out."""
        tokens = self.num_gpu_blocks * self.block_size
        rows = (
            ("weights", self.weights, ""),
            ("graphs", self.graphs, ""),
            ("workspace", self.workspace, ""),
            (
                "KV cache",
                self.kv_cache,
                f"{self.num_gpu_blocks} blocks of {self.block_size} tokens = {tokens:,} tokens",
            ),
            ("reserve", self.reserve, ""),
            ("budget", self.budget, f"of {self.total / GIB:.2f} GiB on {self.device}"),
            ("swap (CPU)", self.swap, f"{self.num_cpu_blocks} blocks"),
        )
        return "\n".join(f"{name:<11}{size / GIB:9.3f} GiB  {note}".rstrip() for name, size, note in rows if size)


def gpu_budget(*, total: int, free: int, held: int, utilization: float) -> tuple[int, int]:
    """What an engine may use of a GPU: its share of all of it, the CUDA context within the share, or what is there.

    Others that use the GPU have shares of their own. Of what is neither free nor the engine's, as much as a CUDA
    context can take counts as the engine's context; so on a GPU of its own nothing goes beyond the share.

    Args:
        total: Bytes of the GPU.
        free: Of which nobody holds these.
        held: And the engine holds these already.
        utilization: The engine's share.

    Returns:
        (the budget; what others hold, the context included), in bytes
    """
    others = total - free - held
    share = int(total * utilization) - min(others, CONTEXT_BYTES)
    return min(share, total - others - (SPARE_BYTES if others > CONTEXT_BYTES else 0)), others


def plan_memory(
    *,
    device: str,
    total: int,
    budget: int,
    weights: int,
    workspace: int,
    graphs: int,
    block_bytes: int,
    block_size: int,
    num_gpu_blocks: int | None,
    num_cpu_blocks: int,
    max_model_len: int,
    most_blocks: int | None = None,
) -> MemoryPlan:
    """Give the KV cache what the rest leaves.

    Args:
        device, total, budget, weights, workspace, graphs, block_bytes, block_size: As in `MemoryPlan`.
        num_gpu_blocks: Blocks that the user asked for; None takes as many as fit.
        num_cpu_blocks: Blocks in CPU memory.
        max_model_len: Tokens that at least one sequence must be able to have.
        most_blocks: Take no more than these, even if more fit; None for no limit.

    Raises:
        OutOfMemoryError: the KV cache cannot hold one sequence of ``max_model_len``, or the blocks that were asked
            for do not fit. The message says what to change.
    """
    left = budget - weights - workspace - graphs
    fitting = max(0, left // block_bytes - 1)  # one block is the null block
    needed = -(-max_model_len // block_size)
    parts = (
        f"of {budget / GIB:.2f} GiB, weights take {weights / GIB:.2f}, workspace {workspace / GIB:.2f} and graphs "
        f"{graphs / GIB:.2f}, which leaves {max(0, left) / GIB:.2f} GiB = {fitting} KV cache blocks of "
        f"{block_bytes / GIB:.5f} GiB"
    )
    if num_gpu_blocks is not None and num_gpu_blocks > fitting:
        raise OutOfMemoryError(
            f"num_gpu_blocks={num_gpu_blocks} does not fit on {device}: {parts}; ask for fewer, or leave it out"
        )
    chosen = num_gpu_blocks
    if chosen is None:
        chosen = fitting if most_blocks is None else min(fitting, most_blocks)
    if chosen < needed:
        ways = "raise gpu_memory_utilization, free memory that other processes hold, or take a smaller model or dtype"
        if num_gpu_blocks is not None:
            ways = "raise num_gpu_blocks, or leave it out"
        raise OutOfMemoryError(
            f"the KV cache on {device} cannot hold one sequence of max_model_len={max_model_len} tokens, which takes "
            f"{needed} blocks; there are {chosen}: {parts}. Lower max_model_len (at most {chosen * block_size} fits), "
            f"{ways}"
        )
    return MemoryPlan(
        device=device,
        total=total,
        budget=budget,
        weights=weights,
        workspace=workspace,
        graphs=graphs,
        block_bytes=block_bytes,
        num_gpu_blocks=chosen,
        num_cpu_blocks=num_cpu_blocks,
        block_size=block_size,
    )
