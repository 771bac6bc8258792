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
bisection, so the grid depends on shapes only. A tile packs BLOCK_Q tokens with all query heads of one KV head. First
it visits the KV tiles that all its tokens see, without a mask, then the few around the diagonal. Both do the same
arithmetic on what is visible, so that a token's result does not depend on where its chunk begins. Later tiles of a
sequence have more to visit: they are started first.

Hopper GPUs have a kernel of their own for most models in 16 bits; see `attention_prefill_hopper`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import attention_prefill_hopper
from mini_infer.kernels.attention_prefill_cpu import paged_prefill_attention_reference
from mini_infer.kernels.common import INTERPRET, check_attention, check_index, next_power_of_2, register_op
from mini_infer.kernels.paging import block_ids, check_strides, is_wide, slots


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the work of one call is cut up on a GPU.

    Attributes:
        block_m: Query rows (tokens times query heads of a KV head) of a program; more where one token has more.
        block_n: Tokens of the context that are loaded at a time.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline over the context.
        registers: Limit on a thread's registers, so that more programs fit on a multiprocessor; None leaves it open.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None


def prefill_config(head_dim: int, element_size: int) -> PrefillConfig:
    """The configuration for a model."""
    block_dim = next_power_of_2(head_dim)
    if element_size == 4:  # no tensor cores: products in registers, which larger tiles would spill
        if block_dim > 128:
            return PrefillConfig(block_m=16, block_n=16, num_warps=8, num_stages=2)
        return PrefillConfig(block_m=32, block_n=32, num_warps=8 if block_dim > 64 else 4, num_stages=2)
    if block_dim > 128:
        return PrefillConfig(block_m=32, block_n=32, num_warps=4, num_stages=2)
    return PrefillConfig(block_m=128, block_n=64, num_warps=8, num_stages=2, registers=128)  # two programs at a time


@triton.jit
def _attend(
    query,  # [BLOCK_M, BLOCK_DIM]
    highest,  # [BLOCK_M]
    total,  # [BLOCK_M]
    acc,  # [BLOCK_M, BLOCK_DIM]
    block,  # [BLOCK_N] block ids of the first tile
    start,
    stop,
    end,  # one past the last position whose K/V may be read
    position,  # [BLOCK_M]
    dims,  # [BLOCK_DIM]
    table,
    key_base,
    value_base,
    cache_stride_block,
    cache_stride_slot,
    scale_log2,
    MASKED: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The online softmax over the KV tiles from start to stop; unmasked, every row must see all of every tile."""
    columns = tl.arange(0, BLOCK_N)
    for kv_tile in range(start, stop, BLOCK_N):
        target = kv_tile + columns  # [BLOCK_N]
        tile = kv_tile // BLOCK_N
        places = (block.to(tl.int64) if WIDE else block) * cache_stride_block
        places += slots(tile, BLOCK_N, BLOCK_SIZE) * cache_stride_slot
        places = places[:, None] + dims[None, :]  # [BLOCK_N, BLOCK_DIM]
        key_source = key_base + places
        value_source = value_base + places
        if MASKED:
            kv_mask = (target < end)[:, None] & (dims < HEAD_DIM)[None, :]
            key = tl.load(key_source, mask=kv_mask, other=0.0)
            value = tl.load(value_source, mask=kv_mask, other=0.0)
        elif HEAD_DIM < BLOCK_DIM:
            key = tl.load(key_source, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            value = tl.load(value_source, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            key = tl.load(key_source)
            value = tl.load(value_source)
        # The next tile's block ids, so that its keys need not wait for them.
        block = block_ids(table, tile + 1, end, BLOCK_N, BLOCK_SIZE)
        if UPCAST_DOT:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        seen = products
        if MASKED:
            visible = target[None, :] <= position[:, None]
            if SLIDING_WINDOW > 0:
                visible = visible & (target[None, :] > position[:, None] - SLIDING_WINDOW)
            seen = tl.where(visible, products, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(seen, axis=1) * scale_log2)
        shift = new_highest
        if MASKED:  # a row may see nothing of this tile and of those before it: subtract 0, not -inf
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        # Spelt out as fma and masked after it: the compiler would fuse where nothing is masked, and only there.
        minus_shift = tl.broadcast_to(-shift[:, None], products.shape)
        weights = tl.exp2(tl.fma(products, tl.full(products.shape, scale_log2, tl.float32), minus_shift))
        if MASKED:
            weights = tl.where(visible, weights, 0.0)
        rescale = tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        highest = new_highest
    return highest, total, acc, block


@triton.jit
def _prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM], strided
    key_cache_ptr,  # [num_blocks, num_kv_heads, BLOCK_SIZE, HEAD_DIM], strided
    value_cache_ptr,  # likewise, with the same strides
    block_table_ptr,  # [num_seqs, max_blocks]
    context_len_ptr,  # [num_seqs]
    start_loc_ptr,  # [num_seqs + 1]
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM] contiguous
    num_seqs,
    num_heads,
    num_kv_heads,
    q_stride_token,
    q_stride_head,
    cache_stride_block,
    cache_stride_head,
    cache_stride_slot,
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
    WIDE: tl.constexpr,  # whether places in the cache take 64 bits
):
    # All heads of the last tile, then of the one before it: the longest first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = program // num_kv_heads
    kv_head = (program % num_kv_heads).to(tl.int64)
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
    q_mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = token * q_stride_token + heads * q_stride_head
    query = tl.load(query_ptr + q_rows[:, None] + dims[None, :], mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_DIM]
    if UPCAST_DOT:
        query = query.to(tl.float32)
    scale_log2 = tl.cast(scale, tl.float32) * 1.4426950408889634  # exp2 is the hardware's exponential

    # Positions up to `lowest` are seen by all rows, those from `end` on by none. A window hides some of the former
    # from the later rows: every tile is masked then.
    lowest = length - q_len + first
    end = length - q_len + tl.minimum(first + BLOCK_Q, q_len)
    start = 0
    diagonal = (lowest + 1) // BLOCK_N * BLOCK_N
    if SLIDING_WINDOW > 0:
        start = tl.maximum(lowest - SLIDING_WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        diagonal = start
    key_base = key_cache_ptr + kv_head * cache_stride_head
    value_base = value_cache_ptr + kv_head * cache_stride_head
    table = block_table_ptr + seq.to(tl.int64) * table_stride
    block = block_ids(table, start // BLOCK_N, end, BLOCK_N, BLOCK_SIZE)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for masked in tl.static_range(0 if SLIDING_WINDOW == 0 else 1, 2):
        highest, total, acc, block = _attend(
            query,
            highest,
            total,
            acc,
            block,
            start if masked == 0 else diagonal,
            diagonal if masked == 0 else end,
            end,
            position,
            dims,
            table,
            key_base,
            value_base,
            cache_stride_block,
            cache_stride_slot,
            scale_log2,
            MASKED=masked == 1,
            SLIDING_WINDOW=SLIDING_WINDOW,
            HEAD_DIM=HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            BLOCK_DIM=BLOCK_DIM,
            BLOCK_N=BLOCK_N,
            PRECISION=PRECISION,
            UPCAST_DOT=UPCAST_DOT,
            WIDE=WIDE,
        )

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
    *,
    config: PrefillConfig | None = None,
) -> Tensor:
    check_strides(key_cache, value_cache)
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1], key_cache.shape[2]
    num_seqs = context_lens.shape[0]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if num_tokens == 0 or num_seqs == 0:
        return out
    block_tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    context_lens, query_start_loc = context_lens.contiguous(), query_start_loc.contiguous()
    if config is None and attention_prefill_hopper.supports(query, key_cache, value_cache):
        attention_prefill_hopper.launch_hopper_prefill(
            query, key_cache, value_cache, block_tables, context_lens, query_start_loc, scale, sliding_window, out
        )
        return out
    config = config or prefill_config(head_dim, query.element_size())
    group = num_heads // num_kv_heads
    block_m = max(config.block_m, next_power_of_2(group))
    block_q = block_m // group
    _prefill_kernel[((num_tokens // block_q + num_seqs) * num_kv_heads,)](
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        query_start_loc,
        out,
        num_seqs,
        num_heads,
        num_kv_heads,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        scale,
        SLIDING_WINDOW=sliding_window,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_DIM=max(16, next_power_of_2(head_dim)),  # tl.dot needs 16 columns
        BLOCK_N=config.block_n,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        UPCAST_DOT=INTERPRET,
        WIDE=is_wide(key_cache),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.registers,
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
        scale: Factor on the scores, > 0; 1 / sqrt(head_dim) when None.
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
    if not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    out: Tensor = _paged_prefill_attention_op(
        query, key_cache, value_cache, block_tables, context_lens, query_start_loc, scale, sliding_window
    )
    return out
