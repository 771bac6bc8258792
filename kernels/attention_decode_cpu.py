"""Decode attention on the CPU: the plain formula, and a faster way to the same result. See `attention_decode`."""

import math

import torch
from torch import Tensor

_GATHER_ELEMENTS = 1 << 19  # K elements gathered at once: stays in the cache, bounds the scratch memory


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int = 0,
) -> Tensor:
    """Decode attention in plain torch, row by row."""
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    group = query.shape[1] // key_cache.shape[1]
    for row, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        start = max(0, length - sliding_window) if sliding_window else 0
        blocks = block_tables[row, : -(-length // key_cache.shape[2])].long()
        key = (
            key_cache[blocks].float().transpose(0, 1).flatten(1, 2)[:, start:length]
        )  # [num_kv_heads, tokens, head_dim]
        value = value_cache[blocks].float().transpose(0, 1).flatten(1, 2)[:, start:length]
        q = query[row].float().view(-1, group, query.shape[2]) * scale  # [num_kv_heads, group, head_dim]
        out[row] = (torch.softmax(q @ key.transpose(1, 2), -1) @ value).flatten(0, 1).to(query.dtype)
    return out


def paged_attention_cpu(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
) -> Tensor:
    """Rows of similar length together, scores block by block, so that K and V are copied once and never transposed."""
    real = context_lens > 0
    if not real.all():
        out = torch.zeros(query.shape, dtype=query.dtype)
        args = block_tables[real], context_lens[real], scale, sliding_window
        out[real] = paged_attention_cpu(query[real], key_cache, value_cache, *args)
        return out
    block_size = key_cache.shape[2]
    lens: list[int] = context_lens.tolist()
    num_blocks = [-(-length // block_size) for length in lens]
    limit = max(1, _GATHER_ELEMENTS // key_cache[0].numel())  # blocks at once
    if len(lens) * max(num_blocks, default=0) <= limit:
        most = max(num_blocks, default=0)
        return _attend_rows(query, key_cache, value_cache, block_tables[:, :most], context_lens, scale, sliding_window)
    out = torch.empty(query.shape, dtype=query.dtype)
    order = sorted(range(len(lens)), key=num_blocks.__getitem__, reverse=True)
    first = 0
    while first < len(order):
        most = num_blocks[order[first]]
        count = max(1, limit // most)
        rows = torch.tensor(order[first : first + count])
        out[rows] = _attend_rows(
            query[rows],
            key_cache,
            value_cache,
            block_tables[rows, :most],
            context_lens[rows],
            scale,
            sliding_window,
        )
        first += count
    return out


def _attend_rows(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int,
) -> Tensor:
    rows, heads, head_dim = query.shape
    _, kv_heads, block_size, _ = key_cache.shape
    blocks = block_tables.shape[1]
    group = heads // kv_heads
    # Past a row's length its table may hold anything: those entries read the null block and are masked below.
    position = torch.arange(blocks * block_size)  # [tokens]
    lens = context_lens.unsqueeze(1)  # [rows, 1]
    hidden = position >= lens  # [rows, tokens]
    if rows > 1:
        block_tables = block_tables.masked_fill(hidden[:, ::block_size], 0)
    if sliding_window:
        hidden |= position < lens - sliding_window
    ids = block_tables.reshape(-1)  # [rows * blocks]
    key = key_cache.index_select(0, ids).float()  # [rows * blocks, kv_heads, block_size, head_dim]
    value = value_cache.index_select(0, ids).float()
    q = (query.float() * scale).view(rows, 1, kv_heads, group, head_dim)
    if blocks > 1:
        q = q.expand(rows, blocks, kv_heads, group, head_dim)
    q = q.reshape(rows * blocks, kv_heads, group, head_dim)
    scores = torch.matmul(q, key.transpose(2, 3)).view(rows, blocks, kv_heads, group, block_size)
    scores = scores.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, group, blocks * block_size)
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    weights = torch.softmax(scores, -1).view(rows, kv_heads, group, blocks, block_size)
    weights = weights.permute(0, 3, 1, 2, 4).reshape(rows * blocks, kv_heads, group, block_size)
    out = torch.matmul(weights, value).view(rows, blocks, heads, head_dim).sum(1)
    if not math.isfinite(float(out.sum())):  # a block's last owner may have left a NaN past the length: 0 * NaN
        value = value.masked_fill(hidden.view(rows * blocks, 1, block_size, 1), 0.0)
        out = torch.matmul(weights, value).view(rows, blocks, heads, head_dim).sum(1)
    return out.to(query.dtype)
