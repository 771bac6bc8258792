"""Sampling on the CPU: the uniform numbers, one row's kept set, and the draws. See `sampling`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mini_infer.kernels.penalties import Penalties, penalize_cpu

_PHILOX_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_TOP_P_CANDIDATES = 1024  # top-p first looks for its set among this many largest weights


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """The uniform number in [0, 1) of each (seed, position).

    Args:
        seeds: [rows] int64, the 64-bit key.
        positions: [rows] int32 or int64, the low 64 bits of the counter.

    Returns:
        [rows] float32, multiples of 2 ** -24.
    """
    seeds, positions = seeds.to(torch.int64), positions.to(torch.int64)
    c0, c1 = positions & _MASK32, (positions >> 32) & _MASK32
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seeds & _MASK32, (seeds >> 32) & _MASK32
    for _ in range(_PHILOX_ROUNDS):
        product0 = c0 * 0xD2511F53  # wraps modulo 2 ** 64: both halves stay right
        product1 = c2 * 0xCD9E8D57
        c0 = ((product1 >> 32) & _MASK32) ^ c1 ^ k0
        c1 = product1 & _MASK32
        c2 = ((product0 >> 32) & _MASK32) ^ c3 ^ k1
        c3 = product0 & _MASK32
        k0 = (k0 + 0x9E3779B9) & _MASK32
        k1 = (k1 + 0xBB67AE85) & _MASK32
    return (c0 >> 8).to(torch.float32) * 2.0**-24


def kept_tokens_reference(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor]:
    """One row's weights and what it may draw from.

    Args:
        logits: [vocab] float32, no NaN, at least one finite.
        temperature: > 0.
        top_k: -1 or >= vocab keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.

    Returns:
        (weights float32 [vocab], largest 1; kept bool [vocab])
    """
    vocab = logits.shape[0]
    weights = ((logits - logits.max()) / temperature).exp_()
    kept = torch.ones_like(weights, dtype=torch.bool)
    if 0 < top_k < vocab:
        kept = logits >= logits.topk(top_k, sorted=False).values.min()
    if top_p < 1.0:
        kept &= logits >= _top_p_threshold(logits, weights, kept, top_p)
    if min_p > 0.0:
        kept &= weights >= min(min_p, 1.0)
    return weights, kept


def _top_p_threshold(logits: Tensor, weights: Tensor, kept: Tensor, top_p: float) -> Tensor:
    """The smallest logit in the top-p set of the kept tokens."""
    candidates = torch.where(kept, logits, float("-inf"))
    target = top_p * torch.where(kept, weights, 0.0).sum(dtype=torch.float64)
    top = min(_TOP_P_CANDIDATES, logits.shape[0])
    while True:
        largest, index = candidates.topk(top)
        mass = weights[index].cumsum(0, dtype=torch.float64)
        if mass[-1] >= target or top == logits.shape[0]:
            break
        top = min(8 * top, logits.shape[0])
    first = int((mass < target).sum())  # tokens before the one that reaches the target
    return largest[min(first, top - 1)]


def sample_cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    penalties: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    if penalties:
        penalize_cpu(logits, Penalties(*penalties))
    x = logits.float()  # [rows, vocab]
    token_ids = x.argmax(-1)  # the lowest index of equals
    highest = x.amax(-1, keepdim=True)
    log_sum = (x - highest).exp_().sum(-1).log_()  # NaN where a logit is, or where a row has no distribution
    temperatures: list[float] = temperature.tolist()
    if any(t > 0.0 for t in temperatures):
        uniform: list[float] = philox_uniform(seeds, positions).tolist()
        finite: list[bool] = torch.isfinite(log_sum).tolist()
        limits = zip(top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
        for row, (k, p, floor) in enumerate(limits):
            if temperatures[row] > 0.0 and finite[row]:
                weights, kept = kept_tokens_reference(x[row], temperatures[row], k, p, floor)
                token_ids[row] = _draw_cpu(weights, kept, uniform[row])
    logprobs = (x.gather(1, token_ids.unsqueeze(1)) - highest).squeeze(1) - log_sum
    return token_ids, logprobs.masked_fill_(~torch.isfinite(log_sum), float("nan"))


def _draw_cpu(weights: Tensor, kept: Tensor, uniform: float) -> int:
    """The first kept index whose cumulative kept weight exceeds uniform * total."""
    mass = torch.where(kept, weights, 0.0).cumsum(0, dtype=torch.float64)  # [vocab]
    total = float(mass[-1])
    index = int(torch.searchsorted(mass, min(uniform * total, total), right=True))
    if index < mass.shape[0]:
        return index
    return int(torch.searchsorted(mass, total))  # rounding reached the total: the last token that adds weight
