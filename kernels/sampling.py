"""Sampling the next token of each row, and its log-probability, without sorting the vocabulary.

Per row, from its logits x [vocab]:
    penalties          lower x for tokens that the sequence has seen, in place (`penalties`)
    temperature == 0   the lowest index of the largest logit; otherwise with w_i = exp((x_i - max x) / temperature)
    top-k              keep x_i >= the k-th largest x (ties kept; k = -1 or k >= vocab keeps all)
    top-p              of those, keep the fewest largest whose weight reaches top_p of the total (ties with the last)
    min-p              of those, keep w_i >= min_p (w is 1 at the most likely token)
    draw               the first kept index whose cumulative kept weight exceeds u * total
    logprob            log_softmax(x) of the token: after penalties, before temperature and cuts

u = Philox-4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) keyed by the row's 64-bit seed at
counter = position, 24 bits in [0, 1): a token depends on its own logits, seed and position only, never on its row or
its neighbours.

logits: [rows, vocab] float32, float16 or bfloat16; temperature, top_p, min_p: [rows] float32; top_k: [rows] int32;
seeds: [rows] int64; positions: [rows] int32 or int64 -> token ids [rows] int64, logprobs [rows] float32. A row with NaN
(or +inf, or nothing but -inf) gives logprob NaN and some token of the vocabulary. Padded rows are ordinary rows.

On the GPU nothing is sorted. The vocabulary is cut into chunks of which one program each takes max, sum of
exponentials and weight, and the maxima of groups of 32 tokens, after penalties; a second kernel combines the chunks in
a fixed order. How many times a row's logits are read:

    greedy       once, and the chunk of 4096 tokens that has the largest
    no cuts      once, and the chunk that is drawn
    cuts         once, and at most 256 groups, 8192 tokens: what nearly all rows of a language model keep is among
                 these (`sampling_candidates`)
    wide cuts    three times, and a span of 8192 tokens; with min-p alone twice (`sampling_wide`): top-p of a flat
                 distribution, top-k of thousands. The L2 cache has much of it the second and third time
    penalties    as without them; the token counts are read once
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels import dependent_launch
from mini_infer.kernels.common import cdiv, check_floating, check_index, next_power_of_2, register_op
from mini_infer.kernels.dependent_launch import release, wait
from mini_infer.kernels.penalties import Penalties, check_penalties, penalize
from mini_infer.kernels.sampling_candidates import BEST, GROUP, launch_candidates
from mini_infer.kernels.sampling_cpu import sample_cpu
from mini_infer.kernels.sampling_search import (
    RowParams,
    first_past,
    has_cuts,
    philox_uniform_of,
    weigh,
    weight_scale,
)
from mini_infer.kernels.sampling_wide import launch_wide

_CHUNK = 4096  # vocabulary entries per program in the first pass: combining those of its threads is half of its work


@triton.jit
def _chunk_stats_kernel(
    logits_ptr,  # [rows, vocab], strided
    max_ptr,  # [rows, chunks] float32
    total_ptr,  # [rows, chunks] float32: sum of exp(x - max) over the chunk
    mass_ptr,  # [rows, chunks] float32: sum of exp((x - max) / temperature); of no meaning for greedy rows
    group_ptr,  # [rows, chunks * CHUNK / GROUP], type of the logits: the largest of each group
    temperature_ptr,  # [rows]
    repetition_ptr,  # [rows] and the next four: `Penalties`; unread unless PENALTIES
    presence_ptr,
    frequency_ptr,
    count_row_ptr,
    counts_ptr,  # [count rows, vocab]
    stride_row,
    counts_stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PENALTIES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)  # no kernel of a step writes it, nor what comes next
    if PENALTIES:
        count_row = tl.load(count_row_ptr + row)
    wait(DEPENDENT)
    chunk = tl.program_id(1)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    row_ptr = logits_ptr + row * stride_row
    x = tl.load(row_ptr + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    if PENALTIES:  # noqa: SIM102 - a constant here, a value there
        if count_row >= 0:
            seen_ptr = counts_ptr + count_row.to(tl.int64) * counts_stride
            x = penalize(x, row_ptr, cols, vocab, row, repetition_ptr, presence_ptr, frequency_ptr, seen_ptr)
    # NaN takes no part in a maximum, unless there is nothing else; it reaches the sum.
    largest = tl.max(tl.reshape(x, [CHUNK // GROUP, GROUP]), axis=1)  # [CHUNK // GROUP]
    highest = tl.max(largest, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(weigh(x, shift, 1.4426950408889634), axis=0)
    mass = total
    if (temperature > 0.0) & (temperature != 1.0):
        mass = tl.sum(weigh(x, shift, weight_scale(temperature)), axis=0)
    at = row * chunks + chunk
    tl.store(mass_ptr + at, mass)
    tl.store(max_ptr + at, highest)
    tl.store(total_ptr + at, total)
    tl.store(group_ptr + at * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP), largest.to(group_ptr.dtype.element_ty))


@triton.jit
def _draw_from_all(row_ptr, vocab, chunk, mass, highest, scale, uniform, CHUNK: tl.constexpr):
    """Without cuts: the chunk where the running weight passes uniform * total, then the token within it."""
    target = uniform * tl.sum(mass, axis=0)  # mass: [BLOCK_CHUNKS]
    chosen = first_past(chunk, mass, 0.0, target, vocab)
    cols = chosen * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + cols, mask=cols < vocab, other=float("-inf")).to(tl.float32)
    before = tl.sum(tl.where(chunk < chosen, mass, 0.0), axis=0)
    return first_past(cols, weigh(x, highest, scale), before, target, vocab)


@triton.jit
def _most_likely(row_ptr, vocab, chunk, maxima, highest, CHUNK: tl.constexpr):
    """The lowest index of the largest logit; of a row where nothing is as large, all of it NaN, the last index."""
    chosen = tl.min(tl.where(maxima == highest, chunk, vocab // CHUNK), axis=0)  # maxima: [BLOCK_CHUNKS]
    cols = chosen * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row_ptr + cols, mask=cols < vocab, other=float("nan")).to(tl.float32)
    return tl.min(tl.where(x == highest, cols, vocab - 1), axis=0)


@triton.jit
def _sample_kernel(
    logits_ptr,  # [rows, vocab], strided
    max_ptr,  # [rows, chunks] and the next two: from _chunk_stats_kernel
    total_ptr,
    mass_ptr,
    temperature_ptr,  # [rows], and the next five
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    todo_ptr,  # [rows] int32: 1 for rows with cuts, which are left to the other kernels, otherwise 0
    stats_ptr,  # [rows, 3] float32: the largest logit, the weight, the log of the sum of exp(x - largest)
    token_ptr,  # [rows] int64
    logprob_ptr,  # [rows] float32
    stride_row,
    vocab,
    chunks,
    BLOCK_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    release(DEPENDENT)
    wait(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    at = row * chunks + chunk
    maxima = tl.load(max_ptr + at, mask=chunk < chunks, other=float("-inf"))
    totals = tl.load(total_ptr + at, mask=chunk < chunks, other=0.0)
    highest = tl.max(maxima, axis=0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    log_sum = tl.log(tl.sum(totals * tl.exp(maxima - shift), axis=0))  # beside large logits it would lose digits
    valid = (log_sum > float("-inf")) & (log_sum < float("inf"))  # false for NaN

    temperature = tl.load(temperature_ptr + row)
    row_ptr = logits_ptr + row * stride_row
    draws = (temperature > 0.0) & valid
    todo = 0
    if draws:
        scale = weight_scale(temperature)
        masses = tl.load(mass_ptr + at, mask=chunk < chunks, other=0.0)
        mass = tl.where(maxima > float("-inf"), masses * weigh(maxima, highest, scale), 0.0)  # [BLOCK_CHUNKS]
        if has_cuts(tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), vocab):
            todo = 1
            tl.store(stats_ptr + row * 3, highest)
            tl.store(stats_ptr + row * 3 + 1, tl.sum(mass, axis=0))
            tl.store(stats_ptr + row * 3 + 2, log_sum)
        else:
            uniform = philox_uniform_of(tl.load(seed_ptr + row), tl.load(position_ptr + row))
            token = _draw_from_all(row_ptr, vocab, chunk, mass, highest, scale, uniform, CHUNK)
            tl.store(token_ptr + row, token.to(tl.int64))
            tl.store(logprob_ptr + row, tl.load(row_ptr + token).to(tl.float32) - highest - log_sum)
    else:
        token = _most_likely(row_ptr, vocab, chunk, maxima, highest, CHUNK)
        tl.store(token_ptr + row, token.to(tl.int64))
        tl.store(logprob_ptr + row, tl.where(valid, -log_sum, float("nan")))
    tl.store(todo_ptr + row, todo)


def _launch_sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    penalties: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    device = logits.device
    token_ids = torch.empty((rows,), dtype=torch.int64, device=device)
    logprobs = torch.empty((rows,), dtype=torch.float32, device=device)
    if rows == 0:
        return token_ids, logprobs
    chunks = cdiv(vocab, _CHUNK)
    maxima = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    totals = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    masses = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    groups = torch.empty((rows, chunks * (_CHUNK // GROUP)), dtype=logits.dtype, device=device)
    todo = torch.empty((rows,), dtype=torch.int32, device=device)
    stats = torch.empty((rows, 3), dtype=torch.float32, device=device)
    row_tensors = (temperature, top_k, top_p, min_p, seeds, positions)
    params = RowParams(*(each.contiguous() for each in row_tensors))
    _chunk_stats_kernel[(rows, chunks)](
        logits,
        maxima,
        totals,
        masses,
        groups,
        params.temperature,
        *(penalties or (logits,) * len(Penalties._fields)),
        logits.stride(0),
        penalties[-1].stride(0) if penalties else 0,
        vocab,
        chunks,
        CHUNK=_CHUNK,
        GROUP=GROUP,
        PENALTIES=bool(penalties),
        num_warps=4,
        **dependent_launch.options(),
    )
    _sample_kernel[(rows,)](
        logits,
        maxima,
        totals,
        masses,
        *params,
        todo,
        stats,
        token_ids,
        logprobs,
        logits.stride(0),
        vocab,
        chunks,
        BLOCK_CHUNKS=next_power_of_2(chunks),
        CHUNK=_CHUNK,
        num_warps=8,
        **dependent_launch.options(),
    )
    pivots = launch_candidates(logits, groups, todo, stats, params, token_ids, logprobs)
    if vocab > BEST * GROUP:  # all tokens of a smaller one are candidates
        launch_wide(logits, todo, stats, pivots, params, token_ids, logprobs)
    return token_ids, logprobs


def _sample_fake(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    penalties: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=torch.int64), logits.new_empty((rows,), dtype=torch.float32)


_sample_op = register_op("sample", _sample_fake, cpu=sample_cpu, cuda=_launch_sample, mutates=("logits",))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    penalties: Penalties | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [rows, vocab]; changed where penalties apply.
        temperature: [rows] float32; 0 is greedy.
        top_k: [rows] int32; -1 keeps all.
        top_p: [rows] float32; 1 keeps all.
        min_p: [rows] float32; 0 keeps all.
        seeds: [rows] int64.
        positions: [rows] int32 or int64, the index of the token being drawn.
        penalties: What to take from the logits first; None takes nothing.

    Returns:
        (token_ids [rows] int64, logprobs [rows] float32), the log-probability under the logits after penalties.
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
    if penalties is not None:
        check_penalties(penalties, logits)
    token_ids, logprobs = _sample_op(logits, temperature, top_k, top_p, min_p, seeds, positions, penalties or ())
    return token_ids, logprobs
