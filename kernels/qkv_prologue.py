"""What lies between a layer's QKV product and its attention, as one op: q/k norm, rotation, and the write to the cache.

    query, key, value = split(qkv)                          per token: num_heads, num_kv_heads, num_kv_heads heads of D
    query, key = rmsnorm(query, q_norm), rmsnorm(key, k_norm)           where the model has these norms (Qwen3)
    query, key = rotate(query, position), rotate(key, position)
    key_cache[slot // block_size, :, slot % block_size] = key;  value_cache alike with value

qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * D], float32, float16 or bfloat16; caches: [num_blocks, num_kv_heads,
block_size, D]; returned: query, [num_tokens, num_heads, D]. The arithmetic is that of `norm`, `rotary` and `kv_store`,
with the same roundings between the steps; the key is written to its slot and nowhere else. Padded rows name slots of
the null block, several of them possibly the same one.

On the GPU a program takes some heads of one token, all of a kind. How many depends on the number of tokens, how a head
is reduced does not.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import (
    cdiv,
    check_caches,
    check_floating,
    check_index,
    check_same,
    next_power_of_2,
    register_op,
    require,
)
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.kv_store import store_kv_reference
from mini_infer.kernels.norm import rmsnorm_reference
from mini_infer.kernels.rotary import apply_rotary_emb_reference, rotate_half

_FEW_TOKENS = 64  # up to here a token's heads are spread over as many multiprocessors as there are groups of them
_PAIRS_PER_WARP = 256  # 8 of 16 bits for a thread: one 16-byte load of each half


def prepare_qkv_reference(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """The composition in plain torch."""
    num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        query, key = rmsnorm_reference(query, q_norm, eps), rmsnorm_reference(key, k_norm, eps)
    query, key = apply_rotary_emb_reference(query, key, cos, sin, positions)
    store_kv_reference(key, value, key_cache, value_cache, slot_mapping)
    return query


@triton.jit
def _norm_rotate_store(
    source,  # [BLOCK_HEADS, BLOCK_HALF] pointers to the first halves of the heads
    target,
    norm_ptr,  # [2 * HALF]; unread unless HAS_NORM
    cos_row,  # [1, BLOCK_HALF] pointers
    sin_row,
    dims,  # [1, BLOCK_HALF]
    mask,
    eps,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    dtype: tl.constexpr = target.dtype.element_ty
    x1 = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos_row, mask=dims < HALF, other=0.0)
    s = tl.load(sin_row, mask=dims < HALF, other=0.0)
    if HAS_NORM:
        w1 = tl.load(norm_ptr + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        w2 = tl.load(norm_ptr + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)
        mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * HALF)  # [BLOCK_HEADS]
        inv_rms = (1.0 / tl.sqrt_rn(mean_square + tl.cast(eps, tl.float32)))[:, None]
        x1 = ((x1 * inv_rms).to(dtype).to(tl.float32) * w1).to(dtype).to(tl.float32)
        x2 = ((x2 * inv_rms).to(dtype).to(tl.float32) * w2).to(dtype).to(tl.float32)
    tl.store(target, (x1 * c - x2 * s).to(dtype), mask=mask)
    tl.store(target + HALF, (x2 * c + x1 * s).to(dtype), mask=mask)


@triton.jit
def _prepare_qkv_kernel(
    qkv_ptr,  # [num_tokens, (num_heads + 2 * num_kv_heads) * D], rows strided
    q_norm_ptr,  # [D]; unread unless HAS_NORM
    k_norm_ptr,
    cos_ptr,  # [max_positions, D/2]
    sin_ptr,
    position_ptr,  # [num_tokens]
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, D], strided
    value_cache_ptr,
    slot_ptr,  # [num_tokens]
    query_ptr,  # [num_tokens, num_heads, D] contiguous
    num_heads,
    num_kv_heads,
    q_programs,  # programs per token for query heads; kv_programs for key heads and as many for value heads follow
    kv_programs,
    eps,
    qkv_stride,
    cos_stride,
    sin_stride,
    kc_stride_block,
    kc_stride_head,
    kc_stride_slot,
    vc_stride_block,
    vc_stride_head,
    vc_stride_slot,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, BLOCK_HALF)[None, :]  # [1, BLOCK_HALF]
    row = qkv_ptr + token * qkv_stride
    if part < q_programs + kv_programs:
        position = tl.load(position_ptr + token).to(tl.int64)
        cos_row = cos_ptr + position * cos_stride + dims
        sin_row = sin_ptr + position * sin_stride + dims
        if part < q_programs:
            heads = (part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]  # [BLOCK_HEADS, 1]
            mask = (heads < num_heads) & (dims < HALF)
            target = query_ptr + (token * num_heads + heads) * (2 * HALF) + dims
            source = row + heads * (2 * HALF) + dims
            _norm_rotate_store(
                source, target, q_norm_ptr, cos_row, sin_row, dims, mask, eps, HALF=HALF, HAS_NORM=HAS_NORM
            )
        else:
            slot = tl.load(slot_ptr + token).to(tl.int64)
            heads = ((part - q_programs) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
            mask = (heads < num_kv_heads) & (dims < HALF)
            block_start = key_cache_ptr + slot // BLOCK_SIZE * kc_stride_block + slot % BLOCK_SIZE * kc_stride_slot
            target = block_start + heads.to(tl.int64) * kc_stride_head + dims
            source = row + (num_heads + heads) * (2 * HALF) + dims
            _norm_rotate_store(
                source, target, k_norm_ptr, cos_row, sin_row, dims, mask, eps, HALF=HALF, HAS_NORM=HAS_NORM
            )
    else:
        slot = tl.load(slot_ptr + token).to(tl.int64)
        heads = ((part - q_programs - kv_programs) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
        mask = (heads < num_kv_heads) & (dims < HALF)
        source = row + (num_heads + num_kv_heads + heads) * (2 * HALF) + dims
        block_start = value_cache_ptr + slot // BLOCK_SIZE * vc_stride_block + slot % BLOCK_SIZE * vc_stride_slot
        target = block_start + heads.to(tl.int64) * vc_stride_head + dims
        x1 = tl.load(source, mask=mask, other=0.0)
        x2 = tl.load(source + HALF, mask=mask, other=0.0)
        tl.store(target, x1, mask=mask)
        tl.store(target + HALF, x2, mask=mask)


def _launch_prepare_qkv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    num_tokens = qkv.shape[0]
    num_kv_heads, block_size, head_dim = key_cache.shape[1:]
    query = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return query
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    has_norm = q_norm is not None and k_norm is not None
    half = head_dim // 2
    block_half = next_power_of_2(half)
    # A warp holds as many heads as give every thread one wide load; a program of more warps holds more heads, each
    # reduced by as many threads as before.
    num_warps = 1 if num_tokens <= _FEW_TOKENS else 2
    block_heads = max(1, _PAIRS_PER_WARP // block_half) * num_warps
    q_programs, kv_programs = cdiv(num_heads, block_heads), cdiv(num_kv_heads, block_heads)
    _prepare_qkv_kernel[(num_tokens, q_programs + 2 * kv_programs)](
        qkv,
        q_norm if has_norm else qkv,
        k_norm if has_norm else qkv,
        cos,
        sin,
        positions.contiguous(),
        key_cache,
        value_cache,
        slot_mapping.contiguous(),
        query,
        num_heads,
        num_kv_heads,
        q_programs,
        kv_programs,
        eps,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        HALF=half,
        BLOCK_SIZE=block_size,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        HAS_NORM=has_norm,
        num_warps=num_warps,
        **dependent_launch.options(),
    )
    return query


def _prepare_qkv_cpu(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Query and key heads are neighbours in a row: treated as one, in half the calls, which is what one token costs."""
    num_kv_heads, head_dim = key_cache.shape[1], key_cache.shape[3]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    both = heads[:, : num_heads + num_kv_heads]
    if q_norm is not None and k_norm is not None:
        x = both.float()
        inv_rms = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # [num_tokens, heads, 1]
        both = (x * inv_rms).to(qkv.dtype)
        both[:, :num_heads].mul_(q_norm)
        both[:, num_heads:].mul_(k_norm)
    c, s = cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)
    both = rotate_half(both, c, s)
    store_kv_reference(both[:, num_heads:], heads[:, num_heads + num_kv_heads :], key_cache, value_cache, slot_mapping)
    return both[:, :num_heads].contiguous()


def _prepare_qkv_fake(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    eps: float,
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], num_heads, key_cache.shape[3]))


_prepare_qkv_op = register_op(
    "qk_norm_rope_store",
    _prepare_qkv_fake,
    cpu=_prepare_qkv_cpu,
    cuda=_launch_prepare_qkv,
    mutates=("key_cache", "value_cache"),
)


def prepare_qkv(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Norm and rotate one step's queries and keys, and write its keys and values into the paged cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], the fused projection; rows may be strided.
        q_norm: [head_dim] weight of the queries' RMSNorm, dtype of qkv; None where the model has none.
        k_norm: As q_norm, for the keys; both or neither.
        cos: [max_positions, head_dim / 2] float32, cos(position * frequency).
        sin: As cos.
        positions: [num_tokens] int32 or int64, each < max_positions.
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of qkv; changed.
        value_cache: As key_cache; changed.
        slot_mapping: [num_tokens] int32 or int64, ``block * block_size + offset`` of each token.
        num_heads: Query heads.
        eps: Added to the mean square of the norms.

    Returns:
        The queries [num_tokens, num_heads, head_dim], contiguous, dtype of qkv.
    """
    check_floating("qkv", qkv)
    check_caches(key_cache, value_cache)
    check_same("qkv", qkv, "key_cache", key_cache)
    _, num_kv_heads, _, head_dim = key_cache.shape
    if qkv.dim() != 2 or qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or num_heads < 1:
        raise ValueError(
            f"qkv must be [num_tokens, {(num_heads + 2 * num_kv_heads) * head_dim}] ({num_heads} + 2 * {num_kv_heads} "
            f"heads of {head_dim}), got {tuple(qkv.shape)}"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] != head_dim:
        raise ValueError(
            f"cos and sin must both be [max_positions, {head_dim / 2:g}] (half of head_dim {head_dim}), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.device != qkv.device or sin.device != qkv.device:
        raise ValueError(
            f"cos and sin must be float32 on {qkv.device}, got {cos.dtype} on {cos.device}, {sin.dtype} on {sin.device}"
        )
    require(cos.stride(1) == 1 and sin.stride(1) == 1, "cos and sin must have stride 1 in their last dimension")
    require((q_norm is None) == (k_norm is None), "q_norm and k_norm must be given both or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            if norm.shape != (head_dim,) or norm.stride(0) != 1:
                raise ValueError(f"{name} must be [{head_dim}] (head_dim) and dense, got {tuple(norm.shape)}")
            check_same(name, norm, "qkv", qkv)
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        if index.dim() != 1 or index.shape[0] != qkv.shape[0]:
            raise ValueError(f"{name} must be [{qkv.shape[0]}] (qkv's rows), got {tuple(index.shape)}")
        check_index(name, index, "qkv", qkv)
    query: Tensor = _prepare_qkv_op(
        qkv, q_norm, k_norm, cos, sin, positions, key_cache, value_cache, slot_mapping, num_heads, eps
    )
    return query
