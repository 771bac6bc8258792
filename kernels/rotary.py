"""Rotary position embedding, half-rotation layout (Su et al. 2021, https://arxiv.org/abs/2104.09864; NeoX, Llama, HF).

With the halves x1 = x[..., :D/2], x2 = x[..., D/2:] and row p of the tables:

    out1 = x1 * cos[p] - x2 * sin[p]
    out2 = x2 * cos[p] + x1 * sin[p]

q: [..., num_heads, D], k: [..., num_kv_heads, D] with equal leading dimensions, float32, float16 or bfloat16; cos, sin:
[max_positions, D/2] float32; position_ids: the leading dimensions, int32 or int64, each < max_positions. Computed in
float32. q and k may be strided views of one fused qkv matrix. Padded rows are ordinary rows at position 0.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.common import cdiv, check_floating, check_index, check_same, next_power_of_2, register_op
from mini_infer.kernels.relaunch import Launches

_HEADS_PER_PROGRAM = 8


def apply_rotary_emb_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """RoPE in plain torch."""
    flat = position_ids.reshape(-1)
    shape = (*position_ids.shape, 1, cos.shape[1])
    c = cos.index_select(0, flat).view(shape)  # [..., 1, D/2]
    s = sin.index_select(0, flat).view(shape)
    return rotate_half(q, c, s), rotate_half(k, c, s)


def rotate_half(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The rotation of x [..., heads, D] by c and s [..., 1, D/2], in plain torch."""
    x1, x2 = x.float().chunk(2, -1)  # [..., heads, D/2] each
    out = torch.cat(((x1 * c).addcmul_(x2, s, value=-1), (x2 * c).addcmul_(x1, s)), -1)
    return out.to(x.dtype)


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    head0,
    num_heads,
    stride_head,
    c,
    s,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    heads = head0 + tl.arange(0, BLOCK_HEADS)  # [BLOCK_HEADS]
    dims = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    mask = (heads < num_heads)[:, None] & (dims < HALF)[None, :]
    source = x_ptr + heads[:, None] * stride_head + dims[None, :]
    x1 = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    target = out_ptr + heads[:, None] * (2 * HALF) + dims[None, :]
    tl.store(target, (x1 * c - x2 * s).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (x2 * c + x1 * s).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_kernel(
    q_ptr,  # [num_tokens, num_heads, D], strided
    k_ptr,  # [num_tokens, num_kv_heads, D], strided
    cos_ptr,  # [max_positions, D/2]
    sin_ptr,
    position_ptr,  # [num_tokens]
    q_out_ptr,  # contiguous
    k_out_ptr,
    num_heads,
    num_kv_heads,
    q_programs,  # programs per token that rotate q; the rest rotate k
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    cos_stride,
    sin_stride,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    position = tl.load(position_ptr + token).to(tl.int64)
    dims = tl.arange(0, BLOCK_HALF)
    c = tl.load(cos_ptr + position * cos_stride + dims, mask=dims < HALF, other=0.0)[None, :]  # [1, BLOCK_HALF]
    s = tl.load(sin_ptr + position * sin_stride + dims, mask=dims < HALF, other=0.0)[None, :]
    if part < q_programs:
        q_out = q_out_ptr + token * num_heads * (2 * HALF)
        _rotate_heads(
            q_ptr + token * q_stride_token,
            q_out,
            part * BLOCK_HEADS,
            num_heads,
            q_stride_head,
            c,
            s,
            HALF,
            BLOCK_HEADS,
            BLOCK_HALF,
        )
    else:
        k_out = k_out_ptr + token * num_kv_heads * (2 * HALF)
        head0 = (part - q_programs) * BLOCK_HEADS
        _rotate_heads(
            k_ptr + token * k_stride_token,
            k_out,
            head0,
            num_kv_heads,
            k_stride_head,
            c,
            s,
            HALF,
            BLOCK_HEADS,
            BLOCK_HALF,
        )


_launches = Launches(_rotary_kernel)


def _by_token(x: Tensor) -> tuple[Tensor, int, int]:
    """(x as [num_tokens, heads, D], a view where its strides allow one; its strides of a token and of a head)"""
    if x.dim() != 3:
        x = x.flatten(0, -3) if x.dim() > 3 else x.unsqueeze(0)
    strides = x.stride()
    if strides[2] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, strides[0], strides[1]


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    q_rows, q_stride_token, q_stride_head = _by_token(q)
    k_rows, k_stride_token, k_stride_head = _by_token(k)
    num_tokens, num_heads, head_dim = q_rows.shape
    num_kv_heads = k_rows.shape[1]
    if num_tokens == 0:
        return q_out, k_out
    block_heads = min(next_power_of_2(num_kv_heads), _HEADS_PER_PROGRAM)
    q_programs = cdiv(num_heads, block_heads)
    half = head_dim // 2
    _launches.first(
        (q, k, cos, sin, position_ids),
        (q_rows, k_rows, cos, sin, position_ids.contiguous()),
        (q_out, k_out),
        (),
        (
            *(num_heads, num_kv_heads, q_programs),
            *(q_stride_token, q_stride_head, k_stride_token, k_stride_head, cos.stride(0), sin.stride(0)),
            *(half, block_heads, next_power_of_2(half)),
        ),
        grid=(num_tokens, q_programs + cdiv(num_kv_heads, block_heads), 1),
        num_warps=2,
    )
    return q_out, k_out


def _launch_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    inputs = q, k, cos, sin, position_ids
    q_out, k_out = _launches.again(inputs) or _launch(*inputs)
    return q_out, k_out


def _rotary_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_rotary_op = register_op("apply_rotary_emb", _rotary_fake, cpu=apply_rotary_emb_reference, cuda=_launch_rotary)


def apply_rotary_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate query and key heads by their positions.

    Args:
        q: [..., num_heads, head_dim].
        k: [..., num_kv_heads, head_dim], leading dimensions, dtype and device of q.
        cos: [max_positions, head_dim / 2] float32, cos(position * frequency).
        sin: As cos.
        position_ids: int32 or int64, the leading dimensions of q; every value < max_positions.

    Returns:
        (q, k) rotated: new contiguous tensors of the shapes and dtypes given.
    """
    outputs = _launches.again((q, k, cos, sin, position_ids))
    if outputs is not None:
        return outputs[0], outputs[1]
    check_floating("q", q)
    check_same("k", k, "q", q)
    shape, k_shape, table_shape = q.shape, k.shape, cos.shape
    if len(shape) < 2 or k_shape[:-2] != shape[:-2] or k_shape[-1] != shape[-1] or shape[-1] % 2 != 0:
        raise ValueError(
            "q and k must be [..., heads, head_dim] with equal leading dimensions and one even head_dim, "
            f"got {tuple(shape)} and {tuple(k_shape)}"
        )
    half = shape[-1] // 2
    if len(table_shape) != 2 or table_shape != sin.shape or table_shape[1] != half:
        raise ValueError(
            f"cos and sin must both be [max_positions, {half}] (half of head_dim {shape[-1]}), "
            f"got {tuple(table_shape)} and {tuple(sin.shape)}; "
            f"Hugging Face tables repeat the half: pass cos[..., :{half}] and sin[..., :{half}]"
        )
    device = q.device
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.device != device or sin.device != device:
        raise ValueError(
            f"cos and sin must be float32 on {device}, got {cos.dtype} on {cos.device}, {sin.dtype} on {sin.device}"
        )
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        raise ValueError("cos and sin must have stride 1 in their last dimension")
    if position_ids.shape != shape[:-2]:
        raise ValueError(
            f"position_ids must be {tuple(shape[:-2])} (q's leading dimensions), got {tuple(position_ids.shape)}"
        )
    check_index("position_ids", position_ids, "q", q)
    q_out, k_out = _rotary_op(q, k, cos, sin, position_ids)
    return q_out, k_out
