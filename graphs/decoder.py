"""The Llama family's decoder as a function: tensors in, tensors out, K/V written at the slots that are named.

Nothing here branches on device data, so a step can be captured, traced (`torch.fx`, `torch.export`) or compiled
(`torch.compile(fullgraph=True)`) as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.prefill_inputs import PrefillInputs
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeRows, SamplingRows
from mini_infer.kernels.attention_decode import paged_attention
from mini_infer.kernels.attention_prefill import paged_prefill_attention
from mini_infer.kernels.linear import linear, linear_silu_mul
from mini_infer.kernels.norm import add_rmsnorm, rmsnorm
from mini_infer.kernels.qkv_prologue import prepare_qkv
from mini_infer.kernels.sampling import sample

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(query [num_tokens, num_heads, head_dim], K cache, V cache, sliding window) -> like query."""


def decode_step(spec: ModelSpec, params: Params, kv: KVCache, rows: DecodeRows) -> tuple[Tensor, Tensor]:
    """One token for every row.

    Args:
        spec: The model.
        params: Its weights.
        kv: The paged cache; each row's K/V is written at position ``seq_lens - 1``.
        rows: State of the rows, padded up to a bucket.

    Returns:
        (token ids [rows] int64, their log probabilities [rows] float32).
    """
    positions = rows.seq_lens.long() - 1  # [rows]
    block_size = kv.blocks.shape[4]
    blocks = rows.block_tables.gather(1, (positions // block_size)[:, None])[:, 0].long()
    slots = blocks * block_size + positions % block_size  # [rows]

    def attend(query: Tensor, key_cache: Tensor, value_cache: Tensor, window: int) -> Tensor:
        return paged_attention(query, key_cache, value_cache, rows.block_tables, rows.seq_lens, sliding_window=window)

    hidden = _layers(spec, params, kv, rows.token_ids, positions, slots, attend)
    return _sample(params, hidden, rows.sampling, rows.seq_lens)


def prefill_step(spec: ModelSpec, params: Params, kv: KVCache, inputs: PrefillInputs) -> tuple[Tensor, Tensor]:
    """Compute packed chunks of prompts, and one token for every chunk (of use where the chunk ends its prompt).

    Args:
        spec: The model.
        params: Its weights.
        kv: The paged cache; the tokens' K/V is written at ``inputs.slot_mapping``.
        inputs: The chunks, padded up to a bucket.

    Returns:
        (token ids [num_seqs] int64, their log probabilities [num_seqs] float32).
    """

    hidden = _prefill_hidden(spec, params, kv, inputs)
    return _sample(params, hidden[inputs.last_tokens], inputs.sampling, inputs.context_lens)


def prefill_logits(spec: ModelSpec, params: Params, kv: KVCache, inputs: PrefillInputs) -> Tensor:
    """Logits of every token of a prefill step, [num_tokens, vocab_size]; for comparing models, not for serving."""
    return linear(_prefill_hidden(spec, params, kv, inputs), params.head)


def _prefill_hidden(spec: ModelSpec, params: Params, kv: KVCache, inputs: PrefillInputs) -> Tensor:
    def attend(query: Tensor, key_cache: Tensor, value_cache: Tensor, window: int) -> Tensor:
        return paged_prefill_attention(
            query,
            key_cache,
            value_cache,
            inputs.block_tables,
            inputs.context_lens,
            inputs.query_start_loc,
            sliding_window=window,
        )

    return _layers(spec, params, kv, inputs.token_ids, inputs.positions, inputs.slot_mapping.long(), attend)


def _layers(
    spec: ModelSpec,
    params: Params,
    kv: KVCache,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    attend: Attention,
) -> Tensor:
    """Embedding to final norm: token ids [num_tokens] to hidden states [num_tokens, hidden_size]."""
    residual = F.embedding(token_ids, params.embedding)
    hidden = rmsnorm(residual, params.layers[0].input_norm, spec.rms_norm_eps)
    for index, layer in enumerate(params.layers):
        key_cache, value_cache = kv.layers[index]
        query = prepare_qkv(
            linear(hidden, layer.qkv),
            layer.q_norm,
            layer.k_norm,
            params.cos,
            params.sin,
            positions,
            key_cache,
            value_cache,
            slots,
            spec.num_heads,
            spec.rms_norm_eps,
        )
        attended = attend(query, key_cache, value_cache, spec.sliding_windows[index])
        hidden = linear(attended.flatten(1), layer.o)
        hidden, residual = add_rmsnorm(hidden, residual, layer.post_norm, spec.rms_norm_eps)
        hidden = linear(linear_silu_mul(hidden, layer.gate_up), layer.down)
        last = index + 1 == spec.num_layers
        next_norm = params.norm if last else params.layers[index + 1].input_norm
        hidden, residual = add_rmsnorm(hidden, residual, next_norm, spec.rms_norm_eps)
    return hidden


def _sample(params: Params, hidden: Tensor, sampling: SamplingRows, positions: Tensor) -> tuple[Tensor, Tensor]:
    logits = linear(hidden, params.head)  # [rows, vocab_size]
    return sample(
        logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seeds, positions
    )
