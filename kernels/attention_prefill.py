"""Prefill attention over the paged KV cache: several sequences' chunks of query tokens packed into one row of tokens.

Sequence s owns the tokens query_start_loc[s] .. query_start_loc[s + 1] - 1, q_len of them, at positions context_lens[s]
- q_len .. context_lens[s] - 1; its earlier context (previous chunks, a prefix-cache hit) is in the cache, and so are
the K/V of the chunk itself. A token at position p attends causally to positions (p - window, p].

query: [num_tokens, num_heads, head_dim] float32, float16 or bfloat16; caches [num_blocks, num_kv_heads, block_size,
head_dim]; block_tables [num_seqs, max_blocks]; context_lens [num_seqs]; query_start_loc [num_seqs + 1] exclusive prefix
sums, the last one num_tokens: every token belongs to a sequence. Padding tokens form an ordinary sequence on the null
block; a sequence may have no query tokens.

On the GPU: FlashAttention-2 tiling (Dao 2023, https://arxiv.org/abs/2307.08691) with the grid of vLLM's unified
attention: tile i belongs to the last sequence s with query_start_loc[s] // BLOCK_Q + s <= i, found on the device by
bisection, so the grid depends on shapes only. A tile packs BLOCK_Q tokens with all query heads of one KV head, and
visits the KV tiles in its causal range.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.common import INTERPRET, check_attention, check_index, next_power_of_2, register_op


def paged_prefill_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """Prefill attention in plain torch, sequence by sequence."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group = query.shape[1] // key_cache.shape[1]
    block_size = key_cache.shape[2]
    starts: list[int] = query_start_loc.tolist()
    for seq, length in enumerate(context_lens.tolist()):
        first, last = starts[seq], starts[seq + 1]
        if first == last:
            continue
        low = (
            max(0, length - (last - first) + 1 - sliding_window) if sliding_window else 0
        )  # first position any token sees
        low_block = low // block_size
        blocks = block_tables[seq, low_block : -(-length // block_size)]
        base = low_block * block_size
        key = _gather(key_cache, blocks, length - base)  # [num_kv_heads, tokens, head_dim]
        value = _gather(value_cache, blocks, length - base)
        q = query[first:last].float().transpose(0, 1)  # [num_heads, q_len, head_dim]
        mask = None
        causal = last - first == length and not sliding_window
        if not causal and (last - first > 1 or sliding_window):
            position = torch.arange(length - (last - first), length, device=query.device)[:, None]  # [q_len, 1]
            target = torch.arange(base, length, device=query.device)[None, :]  # [1, tokens]
            mask = target <= position  # [q_len, tokens]
            if sliding_window:
                mask &= target > position - sliding_window
        if group > 1:
            key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        attended = F.scaled_dot_product_attention(q[None], key[None], value[None], mask, is_causal=causal, scale=scale)
        out[first:last] = attended[0].transpose(0, 1).to(query.dtype)
    return out


def _gather(cache: Tensor, blocks: Tensor, num_tokens: int) -> Tensor:
    gathered = cache.index_select(0, blocks).float()  # [blocks, num_kv_heads, block_size, head_dim]
    return gathered.transpose(0, 1).flatten(1, 2)[:, :num_tokens]


@triton.jit
def _prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM], strided
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM], strided
    value_cache_ptr,
    block_table_ptr,  # [num_seqs, max_blocks]
    context_len_ptr,  # [num_seqs]
    start_loc_ptr,  # [num_seqs + 1]
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM] contiguous
    num_seqs,
    num_heads,
    q_stride_token,
    q_stride_head,
    kc_stride_block,
    kc_stride_head,
    kc_stride_slot,
    vc_stride_block,
    vc_stride_head,
    vc_stride_slot,
    table_stride,
    scale,
    SLIDING_WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    # The last sequence whose first tile, start_loc[s] // BLOCK_Q + s, is <= tile: that sum rises strictly with s.
    low = tile * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(start_loc_ptr + middle).to(tl.int32) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    seq = low
    q_start = tl.load(start_loc_ptr + seq).to(tl.int32)
    q_len = tl.load(start_loc_ptr + seq + 1).to(tl.int32) - q_start
    first = (tile - q_start // BLOCK_Q - seq) * BLOCK_Q  # this tile's first token within the sequence
    if first >= q_len:
        return
    length = tl.load(context_len_ptr + seq).to(tl.int32)

    rows = tl.arange(0, BLOCK_M)  # [BLOCK_M]: token rows // GROUP, query head rows % GROUP
    dims = tl.arange(0, BLOCK_DIM)  # [BLOCK_DIM]
    local = first + rows // GROUP
    row_mask = (rows < BLOCK_Q * GROUP) & (local < q_len)
    token = (q_start + local).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    position = length - q_len + local  # [BLOCK_M]
    dim_mask = dims < HEAD_DIM
    q_mask = row_mask[:, None] & dim_mask[None, :]
    q_rows = token * q_stride_token + heads * q_stride_head
    query = tl.load(query_ptr + q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_DIM]
    if UPCAST_DOT:
        query = query.to(tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * 1.4426950408889634  # exp2 is the hardware's exponential

    end = length - q_len + tl.minimum(first + BLOCK_Q, q_len)  # one past the last position any row sees
    start = 0
    if SLIDING_WINDOW > 0:
        start = tl.maximum(length - q_len + first - SLIDING_WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    key_base = key_cache_ptr + kv_head * kc_stride_head
    value_base = value_cache_ptr + kv_head * vc_stride_head
    table = block_table_ptr + seq.to(tl.int64) * table_stride
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for kv_tile in range(start, end, BLOCK_N):
        target = kv_tile + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        in_range = target < end
        block = tl.load(table + target // BLOCK_SIZE, mask=in_range, other=0).to(tl.int64)
        slot = (target % BLOCK_SIZE).to(tl.int64)
        kv_mask = in_range[:, None] & dim_mask[None, :]
        key_rows = block * kc_stride_block + slot * kc_stride_slot
        value_rows = block * vc_stride_block + slot * vc_stride_slot
        key = tl.load(key_base + key_rows[:, None] + dims[None, :], mask=kv_mask, other=0.0)  # [BLOCK_N, BLOCK_DIM]
        value = tl.load(value_base + value_rows[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        if UPCAST_DOT:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        visible = target[None, :] <= position[:, None]
        if SLIDING_WINDOW > 0:
            visible = visible & (target[None, :] > position[:, None] - SLIDING_WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row may see nothing of this tile and of those before it: subtract 0, not -inf; its weights are 0.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        highest = new_highest

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0 only in rows that are not stored
    out_rows = (token * num_heads + heads) * HEAD_DIM
    tl.store(out_ptr + out_rows[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=q_mask)


def _launch_paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int,
) -> Tensor:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    num_seqs = context_lens.shape[0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_tokens == 0 or num_seqs == 0:
        return out
    block_tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    group = num_heads // num_kv_heads
    block_dim = max(16, next_power_of_2(head_dim))  # tl.dot needs 16 columns
    exact = query.dtype == torch.float32  # no tensor cores: products in registers, which larger tiles would spill
    small_tile = exact or block_dim > 128
    block_m = max(16 if exact and block_dim > 128 else 32 if small_tile else 128, next_power_of_2(group))
    block_q = block_m // group
    _prefill_kernel[(num_tokens // block_q + num_seqs, num_kv_heads)](
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens.contiguous(),
        query_start_loc.contiguous(),
        out,
        num_seqs,
        num_heads,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(0),
        value_cache.stride(1),
        value_cache.stride(2),
        block_tables.stride(0),
        scale,
        SLIDING_WINDOW=sliding_window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_DIM=block_dim,
        BLOCK_N=16 if exact and block_dim > 128 else 32,
        PRECISION="ieee" if exact else "tf32",
        UPCAST_DOT=INTERPRET,
        num_warps=4 if small_tile and not (exact and block_dim > 64) else 8,
        num_stages=2,
    )
    return out


def _paged_prefill_attention_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int,
) -> Tensor:
    return query.new_empty(query.shape)


_paged_prefill_attention_op = register_op(
    "paged_prefill_attention",
    _paged_prefill_attention_fake,
    cpu=paged_prefill_attention_reference,
    cuda=_launch_paged_prefill_attention,
)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float | None = None,
    sliding_window: int = 0,
) -> Tensor:
    """Causal attention of packed chunks of query tokens over their paged contexts.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of query; holds the chunks' own K/V already.
        value_cache: As key_cache.
        block_tables: [num_seqs, max_blocks] int32 or int64; entries past a sequence's length are never followed.
        context_lens: [num_seqs] int32 or int64, tokens up to and including the chunk's last.
        query_start_loc: [num_seqs + 1] int32 or int64, where each sequence's tokens start; first 0, last num_tokens.
        scale: Factor on the scores; 1 / sqrt(head_dim) when None.
        sliding_window: w > 0 lets the query at position p see positions (p - w, p] only; 0 is no window.

    Returns:
        [num_tokens, num_heads, head_dim], dtype of query.
    """
    check_attention(query, key_cache, value_cache, block_tables, context_lens, sliding_window)
    if query_start_loc.dim() != 1 or query_start_loc.shape[0] != context_lens.shape[0] + 1:
        raise ValueError(
            f"query_start_loc must be [{context_lens.shape[0] + 1}] (num_seqs + 1), got {tuple(query_start_loc.shape)}"
        )
    check_index("query_start_loc", query_start_loc, "query", query)
    if scale is None:
        scale = float(query.shape[2]) ** -0.5
    out: Tensor = _paged_prefill_attention_op(
        query, key_cache, value_cache, block_tables, context_lens, query_start_loc, scale, sliding_window
    )
    return out
