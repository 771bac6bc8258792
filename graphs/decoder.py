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
from mini_infer.graphs.params import LayerParams, Params
from mini_infer.graphs.prefill_inputs import PrefillInputs
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeRows, SamplingRows
from mini_infer.kernels.attention_decode import paged_attention
from mini_infer.kernels.attention_prefill import paged_prefill_attention
from mini_infer.kernels.decode_frame import embed_rows
from mini_infer.kernels.linear import add_linear, linear, norm_linear
from mini_infer.kernels.norm import rmsnorm
from mini_infer.kernels.qkv_prologue import prepare_qkv
from mini_infer.kernels.sampling import sample

_MLP_ROWS = 4096
"""Rows that go through an MLP at once: its activations are what a long prefill step needs most memory for."""

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
    penalties = rows.sampling.penalties
    hidden, positions, slots = embed_rows(
        rows.token_ids,
        rows.seq_lens,
        rows.block_tables,
        params.embedding,
        kv.blocks.shape[4],
        penalties.count_rows,
        penalties.token_counts,
    )

    def attend(query: Tensor, key_cache: Tensor, value_cache: Tensor, window: int) -> Tensor:
        return paged_attention(
            query,
            key_cache,
            value_cache,
            rows.block_tables,
            rows.seq_lens,
            sliding_window=window,
        )

    _layers(spec, params, kv, hidden, positions, slots, attend, len(params.layers))
    return _sample(spec, params, hidden, rows.sampling, rows.seq_lens)


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
    hidden, squares = _prefill_layers(spec, params, kv, inputs, len(params.layers) - 1)
    query = _project(spec, params, kv, -1, hidden, squares, inputs.positions, inputs.slot_mapping)
    # With the last layer's K and V stored, the rest of it is for the tokens that one is sampled after, no others; each
    # of them attends to its whole context, as in a decode step.
    last = inputs.last_tokens
    hidden, query = hidden.index_select(0, last), query.index_select(0, last)
    window = spec.sliding_windows[-1]
    attended = paged_attention(query, *kv.layers[-1], inputs.block_tables, inputs.context_lens, sliding_window=window)
    _finish(spec, params.layers[-1], hidden, attended)
    return _sample(spec, params, hidden, inputs.sampling, inputs.context_lens)


def prefill_logits(spec: ModelSpec, params: Params, kv: KVCache, inputs: PrefillInputs) -> Tensor:
    """Logits of every token of a prefill step, [num_tokens, vocab_size]; for comparing models, not for serving."""
    hidden, _ = _prefill_layers(spec, params, kv, inputs, len(params.layers))
    return _logits(spec, params, hidden)


def _prefill_layers(
    spec: ModelSpec, params: Params, kv: KVCache, inputs: PrefillInputs, num_layers: int
) -> tuple[Tensor, Tensor | None]:
    """The first layers for every token: (hidden [num_tokens, hidden_size], squares)."""

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

    hidden = F.embedding(inputs.token_ids, params.embedding)
    squares = _layers(spec, params, kv, hidden, inputs.positions, inputs.slot_mapping, attend, num_layers)
    return hidden, squares


def _layers(
    spec: ModelSpec,
    params: Params,
    kv: KVCache,
    hidden: Tensor,
    positions: Tensor,
    slots: Tensor,
    attend: Attention,
    num_layers: int,
) -> Tensor | None:
    """The first layers. Each half adds its result to the residual stream ``hidden`` [num_tokens, hidden_size] in place.

    Returns:
        The sums of squares of the rows of ``hidden``, where the last product has left them.
    """
    squares = None
    for index in range(num_layers):
        query = _project(spec, params, kv, index, hidden, squares, positions, slots)
        attended = attend(query, *kv.layers[index], spec.sliding_windows[index])
        squares = _finish(spec, params.layers[index], hidden, attended)
    return squares


def _project(
    spec: ModelSpec,
    params: Params,
    kv: KVCache,
    index: int,
    hidden: Tensor,
    squares: Tensor | None,
    positions: Tensor,
    slots: Tensor,
) -> Tensor:
    """A layer's queries, [num_tokens, num_heads, head_dim]; its K and V go to their slots."""
    layer = params.layers[index]
    return prepare_qkv(
        norm_linear(hidden, squares, spec.rms_norm_eps, layer.qkv),
        layer.q_norm,
        layer.k_norm,
        params.cos,
        params.sin,
        positions,
        *kv.layers[index],
        slots,
        spec.num_heads,
        spec.rms_norm_eps,
    )


def _finish(spec: ModelSpec, layer: LayerParams, hidden: Tensor, attended: Tensor) -> Tensor | None:
    """What follows a layer's attention. Returns the squares of the rows of ``hidden``, if they were left."""
    squares = add_linear(hidden, attended.flatten(1), layer.o)
    pieces = hidden.split(_MLP_ROWS)
    if len(pieces) > 1:
        squares = None  # those of all rows
    for rows in pieces:
        gated = norm_linear(rows, squares, spec.rms_norm_eps, layer.gate_up, gated=True)
        left = add_linear(rows, gated, layer.down)
        del gated  # before the next rows need as much
    return left if len(pieces) == 1 else None


def _logits(spec: ModelSpec, params: Params, hidden: Tensor) -> Tensor:
    """[rows, vocab_size]. The norm keeps its weight: a tied head is the embedding as well."""
    return linear(rmsnorm(hidden, params.norm, spec.rms_norm_eps), params.head)


def _sample(
    spec: ModelSpec, params: Params, hidden: Tensor, sampling: SamplingRows, positions: Tensor
) -> tuple[Tensor, Tensor]:
    return sample(
        _logits(spec, params, hidden),
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seeds,
        positions,
        sampling.penalties,
    )
