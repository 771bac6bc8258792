"""From what a user passes in to a `Request`: everything is checked here, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from numbers import Integral
from typing import TypeAlias

from mini_infer.exceptions import InvalidRequestError
from mini_infer.request import Request, check_prompt_length
from mini_infer.sampling import MAX_SEED, SamplingParams
from mini_infer.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]
"""A text, or its token ids."""


class RequestIntake:
    """Makes requests, numbered and seeded.

    Args:
        tokenizer: The model's; None takes token ids only.
        vocab_size: Token ids are below this.
        eos_token_ids: Tokens that end every text, unless a request ignores them.
        max_model_len: Most tokens of one sequence.
        seed: Seed from which requests without one of their own get theirs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._seed = seed
        self._numbers = count()

    def make(self, prompt: Prompt, params: SamplingParams) -> Request:
        """A request for one prompt.

        Raises:
            InvalidRequestError: the prompt is empty, too long, of the wrong type or has ids outside the vocabulary;
                or the parameters ask for something this model cannot do.
        """
        token_ids = self._token_ids(prompt)
        check_prompt_length(len(token_ids), self._max_model_len)
        if params.stop and self._tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        number = next(self._numbers)
        eos = frozenset[int]() if params.ignore_eos else self._eos_token_ids
        return Request(
            request_id=f"request-{number}",
            prompt_token_ids=token_ids,
            sampling=params,
            seed=self._seed_of(number) if params.seed is None else params.seed,
            stop_token_ids=eos.union(params.stop_token_ids),
        )

    def _seed_of(self, number: int) -> int:
        """A seed for request ``number``: multiples of two odd constants, so that neighbours share no pattern."""
        return (self._seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) & MAX_SEED

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequestError(f"a prompt must be a string or a list of token ids, got {prompt!r}")
        if isinstance(prompt, str):
            token_ids = tuple(require_tokenizer(self._tokenizer).encode(prompt))
        else:
            token_ids = _integers(prompt)
        self._check_vocabulary(token_ids)  # a tokenizer may know more tokens than the model
        return token_ids

    def _check_vocabulary(self, token_ids: Sequence[int]) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self._vocab_size):
            outside = next(token_id for token_id in token_ids if not 0 <= token_id < self._vocab_size)
            raise InvalidRequestError(
                f"token ids must be between 0 and {self._vocab_size - 1} (the vocabulary), got {outside}"
            )


def _integers(prompt: Sequence[int]) -> tuple[int, ...]:
    if {type(token_id) for token_id in prompt} <= {int}:
        return tuple(prompt)
    for token_id in prompt:
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise InvalidRequestError(f"a prompt's token ids must be integers, got {token_id!r}")
    return tuple(map(int, prompt))  # NumPy's are integers, too


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer, or an `InvalidRequestError` that says what to do without one."""
    if tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer: give prompts as lists of token ids")
    return tokenizer


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list of prompts. A list of integers is one prompt.

    Raises:
        InvalidRequestError: it is neither a string nor a list.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise InvalidRequestError(f"prompts must be a string, a list of token ids or a list of those, got {prompts!r}")
    if len(prompts) and isinstance(prompts[0], Integral):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
