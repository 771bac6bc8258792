"""What the op files share: registration, cheap argument checks, facts about how Triton runs. No device data is ever
read here."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

_LIBRARY = torch.library.Library("mini_infer", "FRAGMENT")

INTERPRET: bool = bool(triton.knobs.runtime.interpret)
"""Whether the kernels were decorated under TRITON_INTERPRET=1. The interpreter holds bfloat16 as raw bits, so `tl.dot`
on it is garbage: kernels take this as a constexpr and upcast the operands."""

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel anew for a pointer that is no multiple of this many, and the tensor memory
accelerator refuses it."""


@functools.cache
def on_hopper() -> bool:
    """Whether kernels are compiled for a Hopper GPU, by a Triton whose Gluon is the one that is used here."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not INTERPRET and version >= (3, 6) and int(triton.runtime.driver.active.get_current_target().arch) == 90


def register_op(
    name: str,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    mutates: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Register the op ``mini_infer::name`` and return it.

    A raw Library rather than `torch.library.custom_op`: same schema, same traceability, but 1.5 us of overhead a call
    on the CPU against 4 us, and 13 us where an argument is mutated: 4 % of a small model's CPU step.

    Args:
        name: The op's name.
        fake: Shapes and dtypes only; its signature is the schema.
        cpu: Torch implementation.
        cuda: Triton launch.
        mutates: Names of the arguments that are changed in place.
    """
    schema = torch.library.infer_schema(fake, mutates_args=mutates)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"mini_infer::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.mini_infer, name).default
    return op


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few on the CPU, where the interpreter runs the kernels."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless the condition holds. For checks whose message costs nothing to build."""
    if not condition:
        raise ValueError(message)


def check_floating(name: str, tensor: Tensor) -> None:
    """The tensor must be float32, float16 or bfloat16."""
    if not tensor.is_floating_point() or tensor.element_size() > 4:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The tensors must agree in dtype and device."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} must have the dtype of {other_name} ({other.dtype}), got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")


def check_index(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """The tensor must hold int32 or int64 on the device of `like`."""
    if tensor.is_floating_point() or tensor.element_size() not in (4, 8):
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}")


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    """The caches must be two alike views [num_blocks, num_kv_heads, block_size, head_dim], last dimension dense."""
    if key_cache.dim() != 4:
        raise ValueError(
            f"key_cache must be [num_blocks, num_kv_heads, block_size, head_dim], got {tuple(key_cache.shape)}"
        )
    if value_cache.shape != key_cache.shape:
        raise ValueError(
            f"value_cache must have the shape of key_cache {tuple(key_cache.shape)}, got {tuple(value_cache.shape)}"
        )
    check_same("value_cache", value_cache, "key_cache", key_cache)
    if key_cache.stride(-1) != 1 or value_cache.stride(-1) != 1:
        raise ValueError("key_cache and value_cache must have stride 1 in their last dimension")


def check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    sliding_window: int,
) -> None:
    """What decode and prefill attention ask of their common arguments."""
    if query.dim() != 3:
        raise ValueError(f"query must be [rows, num_heads, head_dim], got {tuple(query.shape)}")
    check_floating("query", query)
    check_caches(key_cache, value_cache)
    check_same("key_cache", key_cache, "query", query)
    if query.shape[2] != key_cache.shape[3]:
        raise ValueError(f"query has head_dim {query.shape[2]}, key_cache has {key_cache.shape[3]}")
    if query.shape[1] % key_cache.shape[1] != 0:
        raise ValueError(
            f"query must have a multiple of key_cache's {key_cache.shape[1]} heads (dimension 1), got {query.shape[1]}"
        )
    if query.stride(-1) != 1:
        raise ValueError(f"query must have stride 1 in its last dimension, got {query.stride(-1)}")
    if context_lens.dim() != 1 or block_tables.dim() != 2 or block_tables.shape[0] != context_lens.shape[0]:
        raise ValueError(
            "block_tables must be [num_seqs, max_blocks] and context_lens [num_seqs], "
            f"got {tuple(block_tables.shape)} and {tuple(context_lens.shape)}"
        )
    check_index("block_tables", block_tables, "query", query)
    check_index("context_lens", context_lens, "query", query)
    if sliding_window < 0:
        raise ValueError(f"sliding_window must be >= 0 (0 = none), got {sliding_window}")
