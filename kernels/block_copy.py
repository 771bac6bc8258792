"""Collecting KV cache blocks of all layers into one piece of memory, and putting them back: the device side of a swap.

    gather:   staged[i, part] = cache[part, block_ids[i]]
    scatter:  cache[part, block_ids[i]] = staged[i, part]

cache: [num_parts, num_blocks, part_size], where a part is the K or the V of one layer, so that a block lies in
``num_parts`` places; staged: [num_staged, num_parts, part_size]; block_ids: [num_staged] int64. Bits are copied as they
are, NaN patterns included.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.common import check_same, next_power_of_2, register_op


def gather_blocks_reference(cache: Tensor, block_ids: Tensor, staged: Tensor) -> None:
    """The gather in plain torch."""
    staged.copy_(cache.index_select(1, block_ids).transpose(0, 1))


def scatter_blocks_reference(staged: Tensor, block_ids: Tensor, cache: Tensor) -> None:
    """The scatter in plain torch."""
    cache.index_copy_(1, block_ids, staged.transpose(0, 1))


@triton.jit
def _copy_blocks_kernel(
    cache_ptr,  # [num_parts, num_blocks, part_size], strided
    staged_ptr,  # [num_staged, num_parts, part_size], contiguous
    block_ids_ptr,  # [num_staged]
    part_size,
    cache_stride_part,
    cache_stride_block,
    SCATTER: tl.constexpr,  # from staged to cache instead of the other way
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    block = tl.load(block_ids_ptr + index).to(tl.int64)
    in_cache = cache_ptr + part * cache_stride_part + block * cache_stride_block
    in_staged = staged_ptr + (index * tl.num_programs(1) + part) * part_size
    for start in range(0, part_size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)  # [BLOCK]
        mask = offsets < part_size
        if SCATTER:
            tl.store(in_cache + offsets, tl.load(in_staged + offsets, mask=mask), mask=mask)
        else:
            tl.store(in_staged + offsets, tl.load(in_cache + offsets, mask=mask), mask=mask)


def _launch(cache: Tensor, block_ids: Tensor, staged: Tensor, scatter: bool) -> None:
    num_staged, num_parts, part_size = staged.shape
    if num_staged == 0:
        return
    _copy_blocks_kernel[(num_staged, num_parts)](
        cache,
        staged,
        block_ids.contiguous(),
        part_size,
        cache.stride(0),
        cache.stride(1),
        SCATTER=scatter,
        BLOCK=min(4096, next_power_of_2(part_size)),
        num_warps=4,
    )


def _launch_gather_blocks(cache: Tensor, block_ids: Tensor, staged: Tensor) -> None:
    _launch(cache, block_ids, staged, scatter=False)


def _launch_scatter_blocks(staged: Tensor, block_ids: Tensor, cache: Tensor) -> None:
    _launch(cache, block_ids, staged, scatter=True)


def _gather_blocks_fake(cache: Tensor, block_ids: Tensor, staged: Tensor) -> None:
    return None


def _scatter_blocks_fake(staged: Tensor, block_ids: Tensor, cache: Tensor) -> None:
    return None


_gather_blocks_op = register_op(
    "gather_blocks", _gather_blocks_fake, gather_blocks_reference, _launch_gather_blocks, mutates=("staged",)
)
_scatter_blocks_op = register_op(
    "scatter_blocks", _scatter_blocks_fake, scatter_blocks_reference, _launch_scatter_blocks, mutates=("cache",)
)


def gather_blocks(cache: Tensor, block_ids: Tensor, staged: Tensor) -> None:
    """Copy blocks out of the cache.

    Args:
        cache: [num_parts, num_blocks, part_size], last dimension dense.
        block_ids: [num_staged] int64.
        staged: [num_staged, num_parts, part_size], contiguous, dtype of cache; changed.

    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit together.
    """
    _check(cache, block_ids, staged)
    _gather_blocks_op(cache, block_ids, staged)


def scatter_blocks(staged: Tensor, block_ids: Tensor, cache: Tensor) -> None:
    """Copy blocks into the cache.

    Args:
        staged: [num_staged, num_parts, part_size], contiguous.
        block_ids: [num_staged] int64, all different.
        cache: [num_parts, num_blocks, part_size], last dimension dense, dtype of staged; changed.

    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit together.
    """
    _check(cache, block_ids, staged)
    _scatter_blocks_op(staged, block_ids, cache)


def _check(cache: Tensor, block_ids: Tensor, staged: Tensor) -> None:
    if cache.dim() != 3 or cache.stride(2) != 1:
        raise ValueError(
            "cache must be [num_parts, num_blocks, part_size] with stride 1 in its last dimension, got "
            f"{tuple(cache.shape)} with strides {cache.stride()}"
        )
    if block_ids.dim() != 1 or block_ids.dtype != torch.int64 or block_ids.device != cache.device:
        raise ValueError(
            f"block_ids must be int64 [num_staged] on {cache.device}, got {block_ids.dtype} "
            f"{tuple(block_ids.shape)} on {block_ids.device}"
        )
    expected = (block_ids.shape[0], cache.shape[0], cache.shape[2])
    if staged.shape != expected or not staged.is_contiguous():
        raise ValueError(
            f"staged must be {expected} and contiguous, got {tuple(staged.shape)} with strides {staged.stride()}"
        )
    check_same("staged", staged, "cache", cache)
