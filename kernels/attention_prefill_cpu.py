"""Prefill attention on the CPU: the plain formula, by the library's attention. See `attention_prefill`."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
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
