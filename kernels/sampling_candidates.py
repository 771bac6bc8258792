"""Sampling of a row with cuts from its few best tokens, which is where nearly all rows of a language model end.

The first pass leaves the largest logit of every group of 32 consecutive tokens. The 257th largest of these is a bound
that at most 256 groups go past: together they hold every token above it, 8192 candidates that fit in the registers of
one program. If top-k, top-p and min-p cut above the bound, thresholds and the draw come from the candidates alone, and
nothing else of the row is read again. What decides is exact: the number of candidates, and their weight against that of
the whole row. The other rows are wide; see `sampling_wide`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, multiprocessors, next_power_of_2
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.sampling_search import (
    KEY_SHIFT,
    RowParams,
    first_past,
    key_value,
    lowest_key,
    min_p_key,
    order_key,
    philox_uniform_of,
    reach_key,
    top_p_target,
    weigh,
    weight_scale,
)

GROUP = 32  # tokens
BEST = 256  # groups
PIVOTS = 8
NO_KEY = tl.constexpr(-0x80000000)  # below that of any logit
_RUNS, _RUN = 64, 128  # the sample of a wide row: so many stretches of so many tokens


@triton.jit
def _group_keys(group_ptr, groups, SHIFT: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """The keys of the groups' maxima, [BLOCK_GROUPS] int32; NO_KEY past the last group."""
    group = tl.arange(0, BLOCK_GROUPS)
    maxima = tl.load(group_ptr + group, mask=group < groups, other=float("-inf")).to(tl.float32)
    return tl.where(group < groups, order_key(maxima, SHIFT), NO_KEY)


@triton.jit
def _find_best(
    group_ptr, best_ptr, groups, highest, SHIFT: tl.constexpr, BEST: tl.constexpr, BLOCK_GROUPS: tl.constexpr
):
    """Writes down which groups have candidates, in order.

    Args:
        group_ptr: The row's group maxima.
        best_ptr: [BEST] int32, scratch of this row.

    Returns:
        (how many have; the bound, from which on tokens are candidates)
    """
    key = _group_keys(group_ptr, groups, SHIFT, BLOCK_GROUPS)
    bound = lowest_key(SHIFT)
    if groups > BEST:
        top = order_key(highest, SHIFT) + 1
        lowest = tl.min(tl.where(key > NO_KEY, key, top), axis=0)
        bound = reach_key(key, 1.0, BEST + 1.0, lowest, top) + 1
    is_best = (key >= bound).to(tl.int32)
    tl.store(best_ptr + tl.cumsum(is_best, axis=0) - 1, tl.arange(0, BLOCK_GROUPS), mask=is_best == 1)
    tl.debug_barrier()  # the threads read what others of them wrote
    return tl.sum(is_best, axis=0), bound


@triton.jit
def _candidate_tokens(best_ptr, found, GROUP: tl.constexpr, BEST: tl.constexpr):
    """The tokens of the groups that were found, [BEST * GROUP], ascending, and which of them there are."""
    lane = tl.arange(0, BEST * GROUP)
    filled = lane // GROUP < found
    return tl.load(best_ptr + lane // GROUP, mask=filled, other=0) * GROUP + lane % GROUP, filled


@triton.jit
def _candidate_keys(
    row_ptr, best_ptr, found, bound, vocab, SHIFT: tl.constexpr, GROUP: tl.constexpr, BEST: tl.constexpr
):
    """Their keys, [BEST * GROUP]; NO_KEY for those below the bound."""
    tokens, filled = _candidate_tokens(best_ptr, found, GROUP, BEST)
    filled = filled & (tokens < vocab)
    key = order_key(tl.load(row_ptr + tokens, mask=filled, other=float("-inf")).to(tl.float32), SHIFT)
    return tl.where(filled & (key >= bound), key, NO_KEY)


@triton.jit
def _thresholds(keys, weight, everything, bound, top, vocab, total, top_k, top_p, floor):
    """Where the cuts of a row fall, from its candidates.

    Args:
        keys: Of the candidates; NO_KEY for what is none.
        weight: Theirs; 0 for what is none.
        everything: Whether all tokens are candidates.
        top: Above all keys.
        total: Weight of the row.
        floor: The smallest key that min-p keeps.

    Returns:
        (the smallest key that is kept, whether it is right: whether the cuts fall among the candidates)
    """
    with_k = (top_k > 0) & (top_k < vocab)
    with_p = top_p < 1.0
    reached = with_p & (tl.sum(weight, axis=0) >= top_p_target(top_p, total))
    if with_k:
        reached = tl.sum((keys >= bound).to(tl.int32), axis=0) >= top_k
    settled = everything | reached | ((floor >= bound) & ((with_k & with_p) == 0))

    threshold = bound
    if with_k:
        threshold = reach_key(keys, 1.0, top_k.to(tl.float32), bound, top)
    if with_p:
        kept_weight = tl.sum(tl.where(keys >= threshold, weight, 0.0), axis=0)
        target = top_p_target(top_p, tl.where(with_k | everything, kept_weight, total))
        threshold = reach_key(keys, weight, target, threshold, top)
    return tl.maximum(threshold, floor), settled


@triton.jit
def _choose_pivots(
    row_ptr,
    group_ptr,
    vocab,
    highest,
    temperature,
    total,
    bound,
    counted,
    weighed,
    top_k,
    top_p,
    floor,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PIVOTS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """The keys to measure a wide row at, [PIVOTS], in no order: one that the thresholds cannot be below; that of min-p;
    one that a sixteenth of a sample of the row reaches; and five about where the sample has its threshold.

    Should they be too high, because of few tokens that weigh much, then those above the sixteenth still fit the list.

    Args:
        total: Weight of the row.
        bound: A key that the thresholds are below, or that all of top-k and top-p is unknown from.
        counted, weighed: Number and weight of the tokens from `bound` upwards.
        floor: The smallest key that min-p keeps.
    """
    with_k = (top_k > 0) & (top_k < vocab)
    scale = weight_scale(temperature)
    sample = tl.arange(0, RUNS * RUN)
    x = tl.load(row_ptr + sample // RUN * (vocab // RUNS) + sample % RUN).to(tl.float32)
    key = order_key(x, SHIFT)
    if with_k:
        # k groups have a token at least as large as the k-th largest of their maxima.
        groups_key = _group_keys(group_ptr, tl.cdiv(vocab, GROUP), SHIFT, BLOCK_GROUPS)
        top = order_key(highest, SHIFT) + 1
        lowest = reach_key(groups_key, 1.0, top_k.to(tl.float32), lowest_key(SHIFT), top)
        measure = tl.where(key < bound, 1.0, 0.0)
        share = (top_k - counted) / (vocab - counted)
    else:
        # All tokens below weigh less than what top-p may leave out; e for what rounding adds.
        lowest_value = highest + temperature * (tl.log((1.0 - top_p) * total / vocab) - 1.0)
        lowest = order_key(lowest_value, SHIFT)
        measure = tl.where(key < bound, weigh(x, highest, scale), 0.0)
        share = (top_p * total - weighed) / (total - weighed)
    lowest = tl.minimum(lowest, bound)
    # Several times the sample's own error, which for top-p comes from the few heavy tokens: little is left of it where
    # little is cut off.
    slack = tl.minimum(tl.where(with_k, 0.03, 0.08), 0.5 * (1.0 - share))
    sampled = tl.sum(measure, axis=0)
    low = reach_key(key, measure, (share + slack) * sampled, lowest, bound)
    high = reach_key(key, measure, tl.maximum(share - slack, 0.0) * sampled, lowest, bound) + 1
    sixteenth = reach_key(key, 1.0, RUNS * RUN / 16.0, lowest, bound)
    low_value = key_value(low, SHIFT)
    smallest = tl.min(tl.where(x > float("-inf"), x, highest), axis=0)
    low_value = tl.where(low_value > float("-inf"), low_value, smallest)
    high_value = tl.minimum(key_value(high, SHIFT), highest)
    index = tl.arange(0, PIVOTS)
    part = tl.maximum(index - 3, 0) / (PIVOTS - 4)
    spread = order_key(low_value * (1.0 - part) + high_value * part, SHIFT)
    return tl.where(index == 0, lowest, tl.where(index == 1, floor, tl.where(index == 2, sixteenth, spread)))


@triton.jit
def _candidates_kernel(
    logits_ptr,  # [rows, vocab], strided
    group_ptr,  # [rows, groups], strided, type of the logits: the largest of each group
    todo_ptr,  # [rows] int32: 1 for rows with cuts; becomes 2 for wide rows
    stats_ptr,  # [rows, 3] float32: the largest logit, the weight of the row, the log of its sum of exp(x - largest)
    temperature_ptr,  # [rows], and the next five
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    best_ptr,  # [rows, BEST] int32, scratch
    pivot_ptr,  # [rows, PIVOTS] int32: written for wide rows
    token_ptr,  # [rows] int64: written for the others with cuts
    logprob_ptr,  # [rows] float32: likewise
    stride_row,
    group_stride_row,
    vocab,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PIVOTS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(todo_ptr + row) == 0:
        return
    highest = tl.load(stats_ptr + row * 3)
    total = tl.load(stats_ptr + row * 3 + 1)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    scale = weight_scale(temperature)
    floor = min_p_key(tl.load(min_p_ptr + row), highest, scale, SHIFT)
    uniform = philox_uniform_of(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    row_ptr = logits_ptr + row * stride_row
    groups_ptr = group_ptr + row * group_stride_row
    best_ptr += row * BEST
    found, bound = _find_best(groups_ptr, best_ptr, tl.cdiv(vocab, GROUP), highest, SHIFT, BEST, BLOCK_GROUPS)
    keys = _candidate_keys(row_ptr, best_ptr, found, bound, vocab, SHIFT, GROUP, BEST)
    # A key says all of its logit. That neither logits nor tokens are kept leaves room for a second program.
    weight = tl.where(keys >= bound, weigh(key_value(keys, SHIFT), highest, scale), 0.0)
    top = order_key(highest, SHIFT) + 1
    everything = vocab <= BEST * GROUP
    threshold, settled = _thresholds(keys, weight, everything, bound, top, vocab, total, top_k, top_p, floor)
    if settled:
        kept = tl.where(keys >= threshold, weight, 0.0)
        tokens, _ = _candidate_tokens(best_ptr, found, GROUP, BEST)
        token = first_past(tokens, kept, 0.0, uniform * tl.sum(kept, axis=0), vocab)
        tl.store(token_ptr + row, token.to(tl.int64))
        drawn = tl.load(row_ptr + token).to(tl.float32)
        tl.store(logprob_ptr + row, drawn - highest - tl.load(stats_ptr + row * 3 + 2))
    else:
        pivots = _choose_pivots(
            row_ptr,
            groups_ptr,
            vocab,
            highest,
            temperature,
            total,
            bound,
            tl.sum((keys >= bound).to(tl.float32), axis=0),
            tl.sum(weight, axis=0),
            top_k,
            top_p,
            floor,
            SHIFT,
            GROUP,
            BLOCK_GROUPS,
            PIVOTS,
            RUNS,
            RUN,
        )
        tl.store(pivot_ptr + row * PIVOTS + tl.arange(0, PIVOTS), pivots)
        tl.store(todo_ptr + row, 2)


def launch_candidates(
    logits: Tensor,
    groups: Tensor,
    todo: Tensor,
    stats: Tensor,
    params: RowParams,
    token_ids: Tensor,
    logprobs: Tensor,
) -> Tensor:
    """Draw for the rows with cuts but for the wide ones.

    Args:
        logits: [rows, vocab].
        groups: [rows, at least the groups of vocab], type of the logits: the largest logit of each group.
        todo: [rows] int32, 1 for rows with cuts; set to 2 for wide rows.
        stats: [rows, 3] float32: the largest logit, the weight of the row, the log of its sum of exp(x - largest).
        params: How to sample.
        token_ids: [rows] int64, written for these rows.
        logprobs: [rows] float32, likewise.

    Returns:
        [rows, PIVOTS] int32, for `launch_wide`.
    """
    rows, vocab = logits.shape
    crowded = rows > multiprocessors(logits.device)
    best = torch.empty((rows, BEST), dtype=torch.int32, device=logits.device)
    pivots = torch.empty((rows, PIVOTS), dtype=torch.int32, device=logits.device)
    _candidates_kernel[(rows,)](
        logits,
        groups,
        todo,
        stats,
        *params,
        best,
        pivots,
        token_ids,
        logprobs,
        logits.stride(0),
        groups.stride(0),
        vocab,
        SHIFT=KEY_SHIFT[logits.dtype],
        GROUP=GROUP,
        BEST=BEST,
        BLOCK_GROUPS=next_power_of_2(cdiv(vocab, GROUP)),
        PIVOTS=PIVOTS,
        RUNS=_RUNS,
        RUN=_RUN,
        num_warps=8,
        maxnreg=128 if crowded else None,  # two programs on a multiprocessor then; each takes longer
        **dependent_launch.options(),
    )
    return pivots
