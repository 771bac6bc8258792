"""Sampling the next token of each row, and its log-probability, without sorting the vocabulary.

Per row, from its logits x [vocab]:
    temperature == 0   the lowest index of the largest logit; otherwise with w_i = exp((x_i - max x) / temperature)
    top-k              keep x_i >= the k-th largest x (ties kept; k = -1 or k >= vocab keeps all)
    top-p              of those, keep the fewest largest whose weight reaches top_p of the total (ties with the last)
    min-p              of those, keep w_i >= min_p (w is 1 at the most likely token)
    draw               the first kept index whose cumulative kept weight exceeds u * total
    logprob            log_softmax(x) of the token: of the raw logits, before temperature and cuts

u = Philox-4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) keyed by the row's 64-bit seed at
counter = position, 24 bits in [0, 1): a token depends on its own logits, seed and position only, never on its row or
its neighbours.

logits: [rows, vocab] float32, float16 or bfloat16; temperature, top_p, min_p: [rows] float32; top_k: [rows] int32;
seeds: [rows] int64; positions: [rows] int32 or int64 -> token ids [rows] int64, logprobs [rows] float32. A row with NaN
(or +inf, or nothing but -inf) gives logprob NaN and some token of the vocabulary. Padded rows are ordinary rows.

On the GPU: the vocabulary is cut into chunks whose max, argmax, sum of exponentials and weight are taken by one
program each; a second kernel combines them in a fixed order, which is all that greedy needs. A row without cuts draws a
chunk by its weight, then a token of that chunk. For the other rows the kernel bisects the thresholds on the
order-preserving integer image of the logits, so the kept sets are exact, then draws in two passes.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import check_floating, check_index, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import release, wait

_PHILOX_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_CHUNK = 2048  # vocabulary entries per program in the first pass
_TILE = 4096  # vocabulary entries per step of a row's program
_TOP_P_CANDIDATES = 1024  # on the CPU top-p first looks for its set among this many largest weights


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


@triton.jit
def _chunk_stats_kernel(
    logits_ptr,  # [rows, vocab], strided
    max_ptr,  # [rows, chunks] float32
    argmax_ptr,  # [rows, chunks] int32
    total_ptr,  # [rows, chunks] float32: sum of exp(x - max) over the chunk
    mass_ptr,  # [rows, chunks] float32: sum of exp((x - max) / temperature); of no meaning for greedy rows
    temperature_ptr,  # [rows]
    stride_row,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)  # nobody writes it during a step
    wait(DEPENDENT)
    chunk = tl.program_id(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    x = tl.load(logits_ptr + row * stride_row + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    clean = tl.where(x == x, x, float("-inf"))  # NaN takes no part in the maximum; it reaches the sum
    highest = tl.max(clean, axis=0)
    argmax = tl.min(tl.where(clean == highest, cols, vocab), axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(x - shift), axis=0)
    mass = total
    if temperature > 0.0:
        mass = tl.sum(tl.exp((x - shift) / temperature), axis=0)
    at = row * chunks + chunk
    tl.store(mass_ptr + at, mass)
    tl.store(max_ptr + at, highest)
    tl.store(argmax_ptr + at, argmax)
    tl.store(total_ptr + at, total)


@triton.jit
def _philox_uniform(seed, position):
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


@triton.jit
def _order_key(x):
    """The int32 whose order is the order of the float32 x; -0 and +0 are one value."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _load_tile(row_ptr, start, vocab, highest, temperature, TILE: tl.constexpr):
    """(cols, order keys, weights) of one tile; past the vocabulary the weight is 0 and the key that of -inf."""
    cols = start + tl.arange(0, TILE)
    x = tl.load(row_ptr + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    return cols, _order_key(x), tl.exp((x - highest) / temperature)


@triton.jit
def _count_and_mass(row_ptr, vocab, highest, temperature, pivot, TILE: tl.constexpr):
    """How many tokens have key >= pivot, and their weight."""
    count = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        cols, key, weight = _load_tile(row_ptr, start, vocab, highest, temperature, TILE)
        above = (key >= pivot.to(tl.int32)) & (cols < vocab)
        count += above.to(tl.int32)
        mass += tl.where(above, weight, 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _threshold_key(row_ptr, vocab, highest, temperature, top_k, top_p, TILE: tl.constexpr):
    """The smallest order key that top-k and top-p keep."""
    # Both thresholds: the largest key whose set {key >= low} is big enough, between low (is) and high (is not).
    # Once [low, high) holds one token or one key, {key >= low} is the set.
    low = tl.full([], -2147483648, tl.int64)
    ceiling = _order_key(highest).to(tl.int64) + 1
    if (top_k > 0) & (top_k < vocab):
        high = ceiling
        at_low = vocab + 0 * top_k
        at_high = 0 * top_k
        while (high - low > 1) & (at_low - at_high > 1):
            pivot = (low + high) >> 1
            count, _ = _count_and_mass(row_ptr, vocab, highest, temperature, pivot, TILE)
            enough = count >= top_k
            low = tl.where(enough, pivot, low)
            at_low = tl.where(enough, count, at_low)
            high = tl.where(enough, high, pivot)
            at_high = tl.where(enough, at_high, count)
    if top_p < 1.0:
        high = ceiling
        at_low, mass = _count_and_mass(row_ptr, vocab, highest, temperature, low, TILE)
        at_high = at_low * 0
        target = top_p * mass
        while (high - low > 1) & (at_low - at_high > 1):
            pivot = (low + high) >> 1
            count, mass = _count_and_mass(row_ptr, vocab, highest, temperature, pivot, TILE)
            enough = mass >= target
            low = tl.where(enough, pivot, low)
            at_low = tl.where(enough, count, at_low)
            high = tl.where(enough, high, pivot)
            at_high = tl.where(enough, at_high, count)
    return low.to(tl.int32)


@triton.jit
def _draw(row_ptr, vocab, highest, temperature, threshold, min_weight, uniform, TILE: tl.constexpr):
    """The first token of {key >= threshold, weight >= min_weight} whose cumulative weight exceeds uniform * total."""
    total = highest * 0.0
    for start in range(0, vocab, TILE):
        _, key, weight = _load_tile(row_ptr, start, vocab, highest, temperature, TILE)
        total += tl.sum(tl.where((key >= threshold) & (weight >= min_weight), weight, 0.0), axis=0)
    target = uniform * total
    # The tile where the running sum passes the target; should rounding let none pass, the last tile with weight.
    running = total * 0.0
    found = running > target
    tile = vocab * 0
    before = running
    for start in range(0, vocab, TILE):
        _, key, weight = _load_tile(row_ptr, start, vocab, highest, temperature, TILE)
        tile_mass = tl.sum(tl.where((key >= threshold) & (weight >= min_weight), weight, 0.0), axis=0)
        take = (tile_mass > 0.0) & (found == 0)
        tile = tl.where(take, start, tile)
        before = tl.where(take, running, before)
        running += tile_mass
        found = found | (running > target)
    cols, key, weight = _load_tile(row_ptr, tile, vocab, highest, temperature, TILE)
    kept = (key >= threshold) & (weight >= min_weight) & (weight > 0.0)
    cumulative = before + tl.cumsum(tl.where(kept, weight, 0.0), axis=0)
    token = tl.min(tl.where(kept & (cumulative > target), cols, vocab), axis=0)
    last = tl.max(tl.where(kept, cols, 0), axis=0)
    return tl.where(token < vocab, token, last)


@triton.jit
def _draw_from_all(row_ptr, vocab, chunk, maxima, masses, highest, temperature, uniform, CHUNK: tl.constexpr):
    """`_draw` without cuts: the chunk where the running weight passes uniform * total, then the token within it."""
    mass = tl.where(maxima > float("-inf"), masses * tl.exp((maxima - highest) / temperature), 0.0)  # [BLOCK_CHUNKS]
    running = tl.cumsum(mass, axis=0)
    target = uniform * tl.max(running, axis=0)
    # Should rounding let no chunk pass, the last one with weight.
    passing = tl.min(tl.where((running > target) & (mass > 0.0), chunk, vocab), axis=0)
    chosen = tl.where(passing < vocab, passing, tl.max(tl.where(mass > 0.0, chunk, 0), axis=0))
    before = tl.max(tl.where(chunk < chosen, running, 0.0), axis=0)
    cols = chosen * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    weight = tl.exp((x - highest) / temperature)
    cumulative = before + tl.cumsum(weight, axis=0)
    token = tl.min(tl.where((weight > 0.0) & (cumulative > target), cols, vocab), axis=0)
    last = tl.max(tl.where(weight > 0.0, cols, 0), axis=0)
    return tl.where(token < vocab, token, last)


@triton.jit
def _sample_kernel(
    logits_ptr,  # [rows, vocab], strided
    max_ptr,  # [rows, chunks] and the next three: from _chunk_stats_kernel
    argmax_ptr,
    total_ptr,
    mass_ptr,
    temperature_ptr,  # [rows], and the next five
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    token_ptr,  # [rows] int64
    logprob_ptr,  # [rows] float32
    stride_row,
    vocab,
    chunks,
    BLOCK_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    at = row * chunks + chunk
    maxima = tl.load(max_ptr + at, mask=chunk < chunks, other=float("-inf"))
    argmaxima = tl.load(argmax_ptr + at, mask=chunk < chunks, other=vocab)
    totals = tl.load(total_ptr + at, mask=chunk < chunks, other=0.0)
    highest = tl.max(maxima, axis=0)
    token = tl.min(tl.where(maxima == highest, argmaxima, vocab), axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    log_total = shift + tl.log(tl.sum(totals * tl.exp(maxima - shift), axis=0))
    valid = (log_total > float("-inf")) & (log_total < float("inf"))  # false for NaN

    temperature = tl.load(temperature_ptr + row)
    row_ptr = logits_ptr + row * stride_row
    if (temperature > 0.0) & valid:
        top_k = tl.load(top_k_ptr + row).to(tl.int32)
        top_p = tl.load(top_p_ptr + row)
        min_p = tl.load(min_p_ptr + row)
        uniform = _philox_uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
        cut = ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0)
        if cut:
            threshold = _threshold_key(row_ptr, vocab, highest, temperature, top_k, top_p, TILE)
            min_weight = tl.minimum(min_p, 1.0)
            token = _draw(row_ptr, vocab, highest, temperature, threshold, min_weight, uniform, TILE)
        else:
            masses = tl.load(mass_ptr + at, mask=chunk < chunks, other=0.0)
            token = _draw_from_all(row_ptr, vocab, chunk, maxima, masses, highest, temperature, uniform, CHUNK)
    chosen = tl.load(row_ptr + token).to(tl.float32)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(valid, chosen - log_total, float("nan")))


def _launch_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    token_ids = torch.empty((rows,), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty((rows,), dtype=torch.float32, device=logits.device)
    if rows == 0:
        return token_ids, logprobs
    chunks = -(-vocab // _CHUNK)
    maxima = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    argmaxima = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    totals = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    masses = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    temperature = temperature.contiguous()
    _chunk_stats_kernel[(rows, chunks)](
        logits,
        maxima,
        argmaxima,
        totals,
        masses,
        temperature,
        logits.stride(0),
        vocab,
        chunks,
        CHUNK=_CHUNK,
        num_warps=4,
        **dependent_launch.options(),
    )
    _sample_kernel[(rows,)](
        logits,
        maxima,
        argmaxima,
        totals,
        masses,
        temperature,
        top_k.contiguous(),
        top_p.contiguous(),
        min_p.contiguous(),
        seeds.contiguous(),
        positions.contiguous(),
        token_ids,
        logprobs,
        logits.stride(0),
        vocab,
        chunks,
        BLOCK_CHUNKS=next_power_of_2(chunks),
        CHUNK=_CHUNK,
        TILE=_TILE,
        num_warps=8,
        **dependent_launch.options(),
    )
    return token_ids, logprobs


def _sample_cpu(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    x = logits.float()  # [rows, vocab]
    token_ids = x.argmax(-1)  # the lowest index of equals
    log_total = torch.logsumexp(x, -1)  # NaN where a logit is; NaN or infinite where a row has no distribution
    temperatures: list[float] = temperature.tolist()
    if any(t > 0.0 for t in temperatures):
        uniform: list[float] = philox_uniform(seeds, positions).tolist()
        finite: list[bool] = torch.isfinite(log_total).tolist()
        limits = zip(top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
        for row, (k, p, floor) in enumerate(limits):
            if temperatures[row] > 0.0 and finite[row]:
                weights, kept = kept_tokens_reference(x[row], temperatures[row], k, p, floor)
                token_ids[row] = _draw_cpu(weights, kept, uniform[row])
    logprobs = x.gather(1, token_ids.unsqueeze(1)).squeeze(1) - log_total
    return token_ids, logprobs.masked_fill_(~torch.isfinite(log_total), float("nan"))


def _draw_cpu(weights: Tensor, kept: Tensor, uniform: float) -> int:
    """The first kept index whose cumulative kept weight exceeds uniform * total."""
    mass = torch.where(kept, weights, 0.0).cumsum(0, dtype=torch.float64)  # [vocab]
    total = float(mass[-1])
    index = int(torch.searchsorted(mass, min(uniform * total, total), right=True))
    if index < mass.shape[0]:
        return index
    return int(torch.searchsorted(mass, total))  # rounding reached the total: the last token that adds weight


def _sample_fake(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=torch.int64), logits.new_empty((rows,), dtype=torch.float32)


_sample_op = register_op("sample", _sample_fake, cpu=_sample_cpu, cuda=_launch_sample)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [rows, vocab].
        temperature: [rows] float32; 0 is greedy.
        top_k: [rows] int32; -1 keeps all.
        top_p: [rows] float32; 1 keeps all.
        min_p: [rows] float32; 0 keeps all.
        seeds: [rows] int64.
        positions: [rows] int32 or int64, the index of the token being drawn.

    Returns:
        (token_ids [rows] int64, logprobs [rows] float32), the log-probability under the raw logits.
    """
    check_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [rows, vocab] with stride 1 in the last dimension, got {tuple(logits.shape)}")
    expected = (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, positions.dtype),
    )
    for name, tensor, dtype in expected:
        if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape[0] != logits.shape[0]:
            raise ValueError(f"{name} must be {dtype} [{logits.shape[0]}], got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on the device of logits ({logits.device}), got {tensor.device}")
    check_index("positions", positions, "logits", logits)
    token_ids, logprobs = _sample_op(logits, temperature, top_k, top_p, min_p, seeds, positions)
    return token_ids, logprobs
