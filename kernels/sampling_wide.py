"""Sampling of wide rows: those whose cuts keep more tokens than `sampling_candidates` holds in registers.

Top-p of a flat distribution, top-k of thousands, ties by the thousand. Three kernels; for other rows they do nothing.

    measure    counts and weighs the tokens from each of 8 pivots upwards, for every span of 8192 tokens
    collect    copies the logits between the two pivots around the thresholds into a list
    finish     halves what is between these pivots over the list, which is exact; draws a span, then a token in it

The pivots (`sampling_candidates._choose_pivots`) are a guess, which only makes the list short. Should it mislead, or
top-k leave far more than top-p, the list does not fit and `finish` goes over the row itself instead: slower, with the
same result.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, multiprocessors, next_power_of_2
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.sampling_candidates import PIVOTS
from mini_infer.kernels.sampling_search import (
    KEY_SHIFT,
    RowParams,
    around_thresholds,
    at_key,
    first_past,
    key_value,
    measure_list,
    middle,
    min_p_key,
    order_key,
    philox_uniform_of,
    search_list,
    weigh,
    weight_scale,
)

SPAN = 8192  # tokens that counts and weights are kept of, and that one draw looks through
LISTED = 8  # one in so many tokens of the vocabulary has room in a row's list
_LANES, _EACH = 256, 8  # what is measured at once; a thread sums up what one of its loads brings
_COLLECTED_AT_ONCE = 1024
_SEARCHED_AT_ONCE = 4096
_PROGRAMS = 8  # for each multiprocessor


@triton.jit
def _measure_kernel(
    logits_ptr,  # [rows, vocab], strided
    todo_ptr,  # [rows] int32: 2 for wide rows
    stats_ptr,  # [rows, 3] float32: the largest logit, the weight of the row, the log of its sum of exp(x - largest)
    pivot_ptr,  # [rows, PIVOTS] int32: keys
    temperature_ptr,  # [rows]
    measure_ptr,  # [rows, 2, PIVOTS, spans] float32: count and weight
    stride_row,
    vocab,
    spans,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    SPAN: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(todo_ptr + row) != 2:
        return
    highest = tl.load(stats_ptr + row * 3)
    scale = weight_scale(tl.load(temperature_ptr + row))
    pivot = tl.arange(0, PIVOTS)
    pivots = key_value(tl.load(pivot_ptr + row * PIVOTS + pivot), SHIFT)[:, None, None]  # logits
    lane = tl.arange(0, LANES)[None, :, None]
    each = tl.arange(0, EACH)[None, None, :]
    out = measure_ptr + row * 2 * PIVOTS * spans + pivot * spans
    for index in range(tl.program_id(1), spans, tl.num_programs(1)):
        # Backwards: the L2 cache has the row's end from the pass before, and its beginning for the next.
        span = spans - 1 - index
        count = tl.zeros([PIVOTS, LANES], tl.float32)
        weight = tl.zeros([PIVOTS, LANES], tl.float32)
        for start in range(0, SPAN, LANES * EACH):
            tokens = span * SPAN + start + lane * EACH + each  # [1, LANES, EACH]
            x = tl.load(logits_ptr + row * stride_row + tokens, mask=tokens < vocab, other=float("nan"))
            x = x.to(tl.float32)  # NaN, which a wide row has none of, is not >= anything
            above = (x >= pivots).to(tl.float32)  # [PIVOTS, LANES, EACH]
            count += tl.sum(above, axis=2)
            weight += tl.sum(above * tl.where(x == x, weigh(x, highest, scale), 0.0), axis=2)
        tl.store(out + span, tl.sum(count, axis=1))
        tl.store(out + PIVOTS * spans + span, tl.sum(weight, axis=1))


@triton.jit
def _wide_row(
    pivot_ptr,
    measure_ptr,
    stats_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    temperature_ptr,
    row,
    vocab,
    spans,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
):
    """(pivots [PIVOTS], counts and weights [PIVOTS, BLOCK_SPANS], low, high, floor, highest, scale) of a wide row."""
    highest = tl.load(stats_ptr + row * 3)
    scale = weight_scale(tl.load(temperature_ptr + row))
    floor = min_p_key(tl.load(min_p_ptr + row), highest, scale, SHIFT)
    pivot = tl.arange(0, PIVOTS)
    span = tl.arange(0, BLOCK_SPANS)[None, :]
    at = measure_ptr + row * 2 * PIVOTS * spans + pivot[:, None] * spans + span
    pivots = tl.load(pivot_ptr + row * PIVOTS + pivot)
    counts = tl.load(at, mask=span < spans, other=0.0)
    weights = tl.load(at + PIVOTS * spans, mask=span < spans, other=0.0)
    low, high = around_thresholds(
        pivots,
        tl.sum(counts, axis=1),
        tl.sum(weights, axis=1),
        vocab,
        tl.load(stats_ptr + row * 3 + 1),
        tl.load(top_k_ptr + row),
        tl.load(top_p_ptr + row),
        floor,
        order_key(highest, SHIFT) + 1,
    )
    return pivots, counts, weights, low, high, floor, highest, scale


@triton.jit
def _collect_kernel(
    logits_ptr,  # [rows, vocab], strided
    todo_ptr,  # [rows] and the rest as in _measure_kernel
    stats_ptr,
    pivot_ptr,
    measure_ptr,
    temperature_ptr,  # [rows], and the next three
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    list_ptr,  # [rows, room], type of the logits: those around the thresholds, in order of the vocabulary
    stride_row,
    vocab,
    spans,
    room,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(todo_ptr + row) != 2:
        return
    pivots, counts, _, low, high, _, _, _ = _wide_row(
        pivot_ptr,
        measure_ptr,
        stats_ptr,
        top_k_ptr,
        top_p_ptr,
        min_p_ptr,
        temperature_ptr,
        row,
        vocab,
        spans,
        SHIFT,
        PIVOTS,
        BLOCK_SPANS,
    )
    members = (at_key(low, pivots, counts) - at_key(high, pivots, counts)).to(tl.int32)  # [BLOCK_SPANS]
    if tl.sum(members, axis=0) > room:
        return
    index = tl.arange(0, BLOCK_SPANS)
    for span in range(tl.program_id(1), spans, tl.num_programs(1)):
        if tl.sum(tl.where(index == span, members, 0), axis=0) > 0:
            place = list_ptr + row * room + tl.sum(tl.where(index < span, members, 0), axis=0)
            for start in range(0, SPAN, AT_ONCE):
                tokens = span * SPAN + start + tl.arange(0, AT_ONCE)
                x = tl.load(logits_ptr + row * stride_row + tokens, mask=tokens < vocab, other=float("-inf"))
                key = order_key(x.to(tl.float32), SHIFT)
                member = (key >= low) & (key < high) & (tokens < vocab)
                rank = tl.cumsum(member.to(tl.int32), axis=0)
                tl.store(place + rank - 1, x, mask=member)
                place += tl.max(rank, axis=0)


@triton.jit
def _finish_kernel(
    logits_ptr,  # [rows, vocab], strided
    todo_ptr,  # [rows] and the rest as in _collect_kernel
    stats_ptr,
    pivot_ptr,
    measure_ptr,
    temperature_ptr,  # [rows], and the next five
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    list_ptr,
    token_ptr,  # [rows] int64: written for wide rows
    logprob_ptr,  # [rows] float32: likewise
    stride_row,
    vocab,
    spans,
    room,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(todo_ptr + row) != 2:
        return
    row_ptr = logits_ptr + row * stride_row
    pivots, counts, weights, low, high, floor, highest, scale = _wide_row(
        pivot_ptr,
        measure_ptr,
        stats_ptr,
        top_k_ptr,
        top_p_ptr,
        min_p_ptr,
        temperature_ptr,
        row,
        vocab,
        spans,
        SHIFT,
        PIVOTS,
        BLOCK_SPANS,
    )
    span = tl.arange(0, BLOCK_SPANS)
    at_high = at_key(high, pivots, counts)
    members = (at_key(low, pivots, counts) - at_high).to(tl.int32)  # [BLOCK_SPANS]
    length = tl.sum(members, axis=0)
    source_ptr = list_ptr + row * room
    if length > room:  # no list: the row in its place
        source_ptr = row_ptr
        length = vocab
        members = tl.minimum(tl.maximum(vocab - span * SPAN, 0), SPAN)
    threshold = search_list(
        source_ptr,
        length,
        low,
        high,
        tl.sum(at_high, axis=0),
        tl.sum(at_key(high, pivots, weights), axis=0),
        vocab,
        tl.load(stats_ptr + row * 3 + 1),
        tl.load(top_k_ptr + row),
        tl.load(top_p_ptr + row),
        highest,
        scale,
        SHIFT,
        AT_ONCE,
    )
    threshold = tl.maximum(threshold, floor)

    # What is kept: from the next pivot upwards as measured, the rest of it from the list.
    top = order_key(highest, SHIFT) + 1
    edge = tl.min(tl.where(pivots >= threshold, pivots, top), axis=0)
    length = tl.where(edge > threshold, length, 0)
    above = at_key(edge, pivots, weights)  # [BLOCK_SPANS]
    _, listed = measure_list(source_ptr, length, threshold, edge, highest, scale, SHIFT, AT_ONCE)
    uniform = philox_uniform_of(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    target = uniform * (tl.sum(above, axis=0) + listed)
    # The last span with no more than the target before it. The target is less than the total: the span has weight.
    drawn = tl.full([], 0, tl.int32)
    end = spans
    before = target * 0.0
    while drawn + 1 < end:
        pivot = middle(drawn, end)
        place = tl.minimum(tl.sum(tl.where(span < pivot, members, 0), axis=0), length)
        _, listed = measure_list(source_ptr, place, threshold, edge, highest, scale, SHIFT, AT_ONCE)
        weight = tl.sum(tl.where(span < pivot, above, 0.0), axis=0) + listed
        reached = weight <= target
        drawn = tl.where(reached, pivot, drawn)
        before = tl.where(reached, weight, before)
        end = tl.where(reached, end, pivot)
    tokens = drawn * SPAN + tl.arange(0, SPAN)
    x = tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
    kept = tl.where(order_key(x, SHIFT) >= threshold, weigh(x, highest, scale), 0.0)
    token = first_past(tokens, kept, before, target, vocab)
    tl.store(token_ptr + row, token.to(tl.int64))
    value = tl.load(row_ptr + token).to(tl.float32)
    tl.store(logprob_ptr + row, value - highest - tl.load(stats_ptr + row * 3 + 2))


def launch_wide(
    logits: Tensor,
    todo: Tensor,
    stats: Tensor,
    pivots: Tensor,
    params: RowParams,
    token_ids: Tensor,
    logprobs: Tensor,
) -> None:
    """Draw for the wide rows.

    Args:
        logits: [rows, vocab].
        todo: [rows] int32, 2 for wide rows.
        stats: [rows, 3] float32: the largest logit, the weight of the row, the log of its sum of exponentials.
        pivots: [rows, PIVOTS] int32, from `launch_candidates`.
        params: How to sample.
        token_ids: [rows] int64, written for wide rows.
        logprobs: [rows] float32, likewise.
    """
    rows, vocab = logits.shape
    spans, room = cdiv(vocab, SPAN), cdiv(vocab, LISTED)
    programs = min(spans, cdiv(_PROGRAMS * multiprocessors(logits.device), rows))
    measures = torch.empty((rows, 2, PIVOTS, spans), dtype=torch.float32, device=logits.device)
    lists = torch.empty((rows, room), dtype=logits.dtype, device=logits.device)
    shift, block_spans = KEY_SHIFT[logits.dtype], next_power_of_2(spans)
    _measure_kernel[(rows, programs)](
        logits,
        todo,
        stats,
        pivots,
        params.temperature,
        measures,
        logits.stride(0),
        vocab,
        spans,
        SHIFT=shift,
        PIVOTS=PIVOTS,
        SPAN=SPAN,
        LANES=_LANES,
        EACH=_EACH,
        num_warps=4,
        **dependent_launch.options(),
    )
    _collect_kernel[(rows, programs)](
        logits,
        todo,
        stats,
        pivots,
        measures,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        lists,
        logits.stride(0),
        vocab,
        spans,
        room,
        SHIFT=shift,
        PIVOTS=PIVOTS,
        SPAN=SPAN,
        BLOCK_SPANS=block_spans,
        AT_ONCE=_COLLECTED_AT_ONCE,
        num_warps=4,
        **dependent_launch.options(),
    )
    _finish_kernel[(rows,)](
        logits,
        todo,
        stats,
        pivots,
        measures,
        *params,
        lists,
        token_ids,
        logprobs,
        logits.stride(0),
        vocab,
        spans,
        room,
        SHIFT=shift,
        PIVOTS=PIVOTS,
        SPAN=SPAN,
        BLOCK_SPANS=block_spans,
        AT_ONCE=_SEARCHED_AT_ONCE,
        num_warps=8,
        **dependent_launch.options(),
    )
