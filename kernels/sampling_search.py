"""What the sampling kernels have in common: weights, keys in the order of the logits, searches and draws in registers.

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
