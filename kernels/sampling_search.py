"""What the sampling kernels have in common: weights, keys in the order of the logits, searches in registers
and over lists, draws.

A key is the order-preserving integer of a logit, without the low bits that are the same for all values of its type. So
a search by halves over keys finds a threshold exactly, in 16 steps at most for bfloat16.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""The low bits of a float32 that no value of the type uses."""


class RowParams(NamedTuple):
    """How to sample each row: the arguments of `sample`, contiguous, in the order in which the kernels take them."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor


@triton.jit
def has_cuts(top_k, top_p, min_p, vocab):
    """Whether a row draws from less than all tokens."""
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def order_key(x, SHIFT: tl.constexpr):
    """The int32 whose order is the order of the float32 x; -0 and +0 are one value."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def key_value(key, SHIFT: tl.constexpr):
    """The float32 that has this key."""
    bits = key << SHIFT
    bits = tl.where(bits < 0, (bits | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def lowest_key(SHIFT: tl.constexpr):
    """The key of -inf."""
    return order_key(tl.full([], float("-inf"), tl.float32), SHIFT)


@triton.jit
def middle(low, high):
    """Halfway between two keys, whose sum and difference may not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def weight_scale(temperature):
    """log2(e) / temperature, finite: 0 times it is 0."""
    return tl.minimum(1.4426950408889634 / temperature, 3.0e38)


@triton.jit
def weigh(x, highest, scale):
    """exp((x - highest) / temperature), through the hardware's exponential."""
    return tl.exp2((x - highest) * scale)


@triton.jit
def reach_key(key, measure, target, low, high):
    """The largest key in [low, high) such that the tokens from it upwards measure `target`; low if there is none."""
    while low + 1 < high:
        pivot = middle(low, high)
        enough = tl.sum(tl.where(key >= pivot, measure, 0.0), axis=0) >= target
        low = tl.where(enough, pivot, low)
        high = tl.where(enough, high, pivot)
    return low


@triton.jit
def top_p_target(top_p, total):
    """The weight that top-p keeps out of `total`: at least 1, that of the most likely token."""
    return tl.maximum(top_p * total, 1.0)


@triton.jit
def min_p_key(min_p, highest, scale, SHIFT: tl.constexpr):
    """The smallest key that min-p keeps."""
    low = lowest_key(SHIFT)
    high = order_key(highest, SHIFT)
    if min_p > 0.0:
        while low + 1 < high:
            pivot = middle(low, high)
            kept = weigh(key_value(pivot, SHIFT), highest, scale) >= tl.minimum(min_p, 1.0)
            low = tl.where(kept, low, pivot)
            high = tl.where(kept, pivot, high)
        low = high
    return low


@triton.jit
def at_key(key, pivots, values):
    """`values` [PIVOTS, n] at the pivot that is this key, [n]; 0 if none is."""
    return tl.max(tl.where((pivots == key)[:, None], values, 0.0), axis=0)


@triton.jit
def around_thresholds(pivots, counts, weights, vocab, total, top_k, top_p, floor, top):
    """(low, high): top-k's and top-p's thresholds are in [low, high), as far as they are not below `floor`."""
    with_k = (top_k > 0) & (top_k < vocab)
    with_p = top_p < 1.0
    low = tl.min(pivots, axis=0)
    high = low
    target = top_p_target(top_p, total)
    if with_k:
        enough = counts >= top_k
        low = tl.max(tl.where(enough, pivots, low), axis=0)
        high = tl.min(tl.where(enough, top, pivots), axis=0)
        # Top-p's target is not known before the threshold of top-k, only that it is not less than this.
        target = top_p_target(top_p, tl.max(tl.where(pivots == high, weights, 0.0), axis=0))
    if with_p:
        enough = weights >= target
        high = tl.min(tl.where(enough, top, pivots), axis=0)
        if with_k == 0:
            low = tl.max(tl.where(enough, pivots, low), axis=0)
    if (with_k & with_p) == 0:
        low = tl.maximum(low, floor)
        high = tl.maximum(high, floor)
    return low, high


@triton.jit
def measure_list(source_ptr, length, low, high, highest, scale, SHIFT: tl.constexpr, AT_ONCE: tl.constexpr):
    """(number, weight) of the first `length` logits of a list that have a key in [low, high)."""
    count = tl.zeros([AT_ONCE], tl.float32)
    weight = tl.zeros([AT_ONCE], tl.float32)
    for start in range(0, length, AT_ONCE):
        place = start + tl.arange(0, AT_ONCE)
        x = tl.load(source_ptr + place, mask=place < length, other=float("-inf")).to(tl.float32)
        key = order_key(x, SHIFT)
        inside = (key >= low) & (key < high) & (place < length)
        count += inside.to(tl.float32)
        weight += tl.where(inside, weigh(x, highest, scale), 0.0)
    return tl.sum(count, axis=0), tl.sum(weight, axis=0)


@triton.jit
def search_list(
    source_ptr,
    length,
    low,
    high,
    count_above,
    weight_above,
    vocab,
    total,
    top_k,
    top_p,
    highest,
    scale,
    SHIFT: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The smallest key in [low, high) that top-k and top-p keep, as `reach_key`, over a list.

    Args:
        count_above, weight_above: Of the tokens from `high` upwards, whether the list has them or not.
    """
    threshold = low
    target = top_p_target(top_p, total)
    if (top_k > 0) & (top_k < vocab):
        end = high
        while threshold + 1 < end:
            pivot = middle(threshold, end)
            count, _ = measure_list(source_ptr, length, pivot, high, highest, scale, SHIFT, AT_ONCE)
            enough = count_above + count >= top_k
            threshold = tl.where(enough, pivot, threshold)
            end = tl.where(enough, end, pivot)
        if top_p < 1.0:
            _, weight = measure_list(source_ptr, length, threshold, high, highest, scale, SHIFT, AT_ONCE)
            target = top_p_target(top_p, weight_above + weight)
    if top_p < 1.0:
        end = high
        while threshold + 1 < end:
            pivot = middle(threshold, end)
            _, weight = measure_list(source_ptr, length, pivot, high, highest, scale, SHIFT, AT_ONCE)
            enough = weight_above + weight >= target
            threshold = tl.where(enough, pivot, threshold)
            end = tl.where(enough, end, pivot)
    return threshold


@triton.jit
def first_past(index, weight, before, target, end):
    """The first index where the running weight passes `target`; should rounding let none pass, the last with weight.

    Args:
        index: [n], ascending, below `end`.
        weight: [n].
        before: Weight of what precedes them.
    """
    running = before + tl.cumsum(weight, axis=0)
    first = tl.min(tl.where((weight > 0.0) & (running > target), index, end), axis=0)
    last = tl.max(tl.where(weight > 0.0, index, 0), axis=0)
    return tl.where(first < end, first, last)


@triton.jit
def philox_uniform_of(seed, position):
    """philox_uniform of one row: the integers in uint64 lanes of 32 bits."""
    key = seed.to(tl.uint64)
    counter = position.to(tl.int64).to(tl.uint64)
    k0 = key & 0xFFFFFFFF
    k1 = key >> 32
    c0 = counter & 0xFFFFFFFF
    c1 = counter >> 32
    c2 = k0 - k0
    c3 = k0 - k0
    for _ in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ k0
        c1 = product1 & 0xFFFFFFFF
        c2 = (product0 >> 32) ^ c3 ^ k1
        c3 = product0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return (c0 >> 8).to(tl.float32) * 5.960464477539063e-08  # 2 ** -24
