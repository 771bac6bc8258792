"""Penalties on the tokens that a sequence has seen: part of `sampling`, before everything else.

For each logit x of a token that was in the prompt, or was generated `count` times so far:

    x = x / repetition if x > 0 else x * repetition      (Keskar et al. 2019, https://arxiv.org/abs/1909.05858)
    x = x - frequency * count - presence                 if count > 0, the prompt not counted

in float32, rounded to the type of the logits: what is less than half of their spacing changes nothing. What a sequence
has seen is a row of token_counts [count rows, vocab] int16: twice the times that each token was generated, plus 1 if
the prompt has it. `token_counts_of` makes such a row, and every decode step counts the tokens at hand in it
(`decode_frame.embed_rows`), before it samples the next ones.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

MAX_COUNT = 2**14 - 1
"""Tokens are counted up to this: it is what 15 bits hold."""

NO_COUNTS = -1
"""In place of a row of token counts, where a row has no penalties."""


class Penalties(NamedTuple):
    """What to take from each row's logits.

    Attributes:
        repetition: [rows] float32, greater than 0; 1 changes nothing.
        presence: [rows] float32; 0 changes nothing.
        frequency: [rows] float32; 0 changes nothing.
        count_rows: [rows] int32, each row's row of `token_counts`; -1 leaves its logits alone.
        token_counts: [count rows, vocab] int16, as the module describes it.
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    count_rows: Tensor
    token_counts: Tensor


def token_counts_of(
    prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], vocab_size: int
) -> NDArray[np.int16]:
    """A row of token counts, [vocab_size].

    Args:
        prompt_token_ids: Tokens of the prompt.
        output_token_ids: Generated tokens.
        vocab_size: All tokens are below this.
    """
    counts = np.zeros(vocab_size, dtype=np.int16)
    tokens, times = np.unique(np.asarray(output_token_ids, dtype=np.int64), return_counts=True)
    counts[tokens] = 2 * np.minimum(times, MAX_COUNT)
    counts[np.asarray(prompt_token_ids, dtype=np.int64)] |= 1
    return counts


def count_tokens_cpu(token_ids: Tensor, count_rows: Tensor, token_counts: Tensor) -> None:
    """Count one more generated token of each row that has a row of counts.

    Args:
        token_ids: [rows] int64.
        count_rows: [rows] int32, no two alike but for -1.
        token_counts: [count rows, vocab] int16; changed.
    """
    counted = count_rows >= 0
    if counted.any():
        place = count_rows[counted].long(), token_ids[counted]
        counts = token_counts[place]
        token_counts[place] = torch.where(counts < 2 * MAX_COUNT, counts + 2, counts)


def penalize_cpu(logits: Tensor, penalties: Penalties) -> None:
    """Apply the penalties to the logits, in place.

    Args:
        logits: [rows, vocab]; changed.
        penalties: What to take from them.
    """
    values = (penalties.repetition, penalties.presence, penalties.frequency, penalties.count_rows)
    for row, (repetition, presence, frequency, source) in enumerate(zip(*(v.tolist() for v in values), strict=True)):
        if source >= 0:
            seen = penalties.token_counts[source].nonzero()[:, 0]
            x = logits[row, seen].float()
            count = (penalties.token_counts[source, seen] >> 1).float()
            x = torch.where(x > 0, x / repetition, x * repetition)
            logits[row, seen] = (x - frequency * count - presence * (count > 0)).to(logits.dtype)


@triton.jit
def count_token(count_row, token, counts_ptr, counts_stride, MAX_COUNT: tl.constexpr):
    """Count one more generated token of one row, unless count_row is -1."""
    if count_row >= 0:
        place = counts_ptr + count_row.to(tl.int64) * counts_stride + token
        count = tl.load(place).to(tl.int32)
        tl.store(place, tl.where(count < 2 * MAX_COUNT, count + 2, count).to(tl.int16))


@triton.jit
def penalize(
    x,  # float32, of the tokens `cols` of one row
    logits_ptr,  # the row's logits; those that were penalized are stored
    cols,
    vocab,
    row,
    repetition_ptr,  # [rows], and the next two
    presence_ptr,
    frequency_ptr,
    counts_ptr,  # the row's token counts
):
    """The penalized logits of one row that has token counts, rounded to their type."""
    seen = tl.load(counts_ptr + cols, mask=cols < vocab, other=0)
    repetition = tl.load(repetition_ptr + row)
    count = (seen >> 1).to(tl.float32)
    lowered = tl.where(x > 0, x / repetition, x * repetition)
    lowered -= tl.load(frequency_ptr + row) * count + tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    stored = lowered.to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + cols, stored, mask=seen != 0)
    return tl.where(seen != 0, stored.to(tl.float32), x)


def check_penalties(penalties: Penalties, logits: Tensor) -> None:
    """See that the penalties fit the logits.

    Raises:
        ValueError: a wrong shape, type or device.
    """
    rows, vocab = logits.shape
    for name, dtype in (
        ("repetition", torch.float32),
        ("presence", torch.float32),
        ("frequency", torch.float32),
        ("count_rows", torch.int32),
    ):
        tensor = getattr(penalties, name)
        if tensor.dtype != dtype or tensor.shape != (rows,) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be {dtype} [{rows}], contiguous, got {tensor.dtype} {tuple(tensor.shape)}")
    counts = penalties.token_counts
    if counts.dtype != torch.int16 or counts.dim() != 2 or counts.shape[1] != vocab or counts.stride(1) != 1:
        raise ValueError(
            f"token_counts must be int16 [count rows, {vocab}], dense in its rows, got {counts.dtype} "
            f"{tuple(counts.shape)}"
        )
    if any(tensor.device != logits.device for tensor in penalties):
        raise ValueError(f"penalties must be on the device of logits ({logits.device})")
