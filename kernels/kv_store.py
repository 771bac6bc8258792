"""Writing keys and values into the paged cache (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

    key_cache[slot // block_size, :, slot % block_size, :] = key[token],  slot = slot_mapping[token];  values alike

key, value: [num_tokens, num_kv_heads, head_dim], strided views welcome; caches: [num_blocks, num_kv_heads, block_size,
head_dim]; slot_mapping: [num_tokens] int64. There is no -1: padded rows name a slot of the null block (block 0),
several of them possibly the same one, and what that slot then holds is never read by a real row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.common import cdiv, check_caches, check_index, check_same, next_power_of_2, register_op


def store_kv_reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """The writes in plain torch."""
    block_size = key_cache.shape[2]
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")  # [num_tokens]
    where = (blocks, slot_mapping - blocks * block_size)
    key_cache.transpose(1, 2).index_put_(where, key)  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache.transpose(1, 2).index_put_(where, value)


@triton.jit
def _store_kv_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, head_dim], strided
    value_ptr,
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_dim], strided
    value_cache_ptr,
    slot_ptr,  # [num_tokens]
    num_kv_heads,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    kc_stride_block,
    kc_stride_head,
    kc_stride_slot,
    vc_stride_block,
    vc_stride_head,
    vc_stride_slot,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)  # [BLOCK_HEADS]
    dims = tl.arange(0, BLOCK_DIM)  # [BLOCK_DIM]
    mask = (heads < num_kv_heads)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = heads.to(tl.int64)[:, None]
    dims = dims[None, :]
    key = tl.load(key_ptr + token * key_stride_token + heads * key_stride_head + dims, mask=mask, other=0.0)
    value = tl.load(value_ptr + token * value_stride_token + heads * value_stride_head + dims, mask=mask, other=0.0)
    key_target = key_cache_ptr + block * kc_stride_block + heads * kc_stride_head + offset * kc_stride_slot + dims
    value_target = value_cache_ptr + block * vc_stride_block + heads * vc_stride_head + offset * vc_stride_slot + dims
    tl.store(key_target, key, mask=mask)
    tl.store(value_target, value, mask=mask)


def _launch_store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value.stride(-1) == 1 else value.contiguous()
    block_dim = next_power_of_2(head_dim)
    block_heads = min(next_power_of_2(num_kv_heads), max(1, 2048 // block_dim))
    _store_kv_kernel[(num_tokens, cdiv(num_kv_heads, block_heads))](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping.contiguous(),
        num_kv_heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        BLOCK_SIZE=key_cache.shape[2],
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=block_dim,
        num_warps=4,
    )


def _store_kv_fake(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    return None


_store_kv_op = register_op(
    "store_kv", _store_kv_fake, cpu=store_kv_reference, cuda=_launch_store_kv, mutates=("key_cache", "value_cache")
)


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write one step's keys and values into their slots of the paged cache, in place.

    Args:
        key: [num_tokens, num_kv_heads, head_dim].
        value: Shape and dtype of key.
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of key; changed.
        value_cache: As key_cache; changed.
        slot_mapping: [num_tokens] int64, ``block * block_size + offset`` of each token.
    """
    check_caches(key_cache, value_cache)
    if key.dim() != 3 or key.shape[1] != key_cache.shape[1] or key.shape[2] != key_cache.shape[3]:
        raise ValueError(
            f"key must be [num_tokens, {key_cache.shape[1]}, {key_cache.shape[3]}] as key_cache has it, "
            f"got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key {tuple(key.shape)}, got {tuple(value.shape)}")
    check_same("key", key, "key_cache", key_cache)
    check_same("value", value, "key_cache", key_cache)
    if slot_mapping.dim() != 1 or slot_mapping.shape[0] != key.shape[0]:
        raise ValueError(f"slot_mapping must be [{key.shape[0]}] (one slot per token), got {tuple(slot_mapping.shape)}")
    if slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping must be int64, got {slot_mapping.dtype}")
    check_index("slot_mapping", slot_mapping, "key", key)
    _store_kv_op(key, value, key_cache, value_cache, slot_mapping)
