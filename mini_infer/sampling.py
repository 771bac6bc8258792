"""What a user may ask of the sampler. Pure data: the draw itself is `mini_infer.kernels.sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mini_infer.exceptions import InvalidRequestError

DEFAULT_MAX_TOKENS = 16
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1
MAX_TEMPERATURE = 1e6
MAX_PENALTY = 2.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Penalties come first, greedy or not. On a GPU a penalized logit is rounded to the model's dtype: in bfloat16 a
    penalty below about 0.3 % of the logits does nothing. Then the candidate set is cut in this order: temperature,
    top-k, top-p over what top-k left, min-p. Equal logits share their fate: a tie at the edge of a set is kept
    whole.

    Attributes:
        temperature: Divides the logits; 0 is greedy. Between 0 and 1e6.
        top_p: Keep the smallest set of most likely tokens whose probability reaches this. In (0, 1].
        top_k: Keep the ``top_k`` most likely tokens; -1 keeps all.
        min_p: Drop tokens less likely than ``min_p`` times the most likely one. In [0, 1].
        repetition_penalty: Divides positive logits, and multiplies negative ones, of every token of the prompt and of
            the text so far. Above 1 discourages repetition, 1 changes nothing. Between 0.01 and 100.
        presence_penalty: Taken from the logit of every token that was generated before. Between -2 and 2.
        frequency_penalty: Taken from a token's logit for each time that it was generated before. Between -2 and 2.
        seed: Seed of this request's draws. The draws of a seed are the same whatever else is in the batch.
            None takes one from the engine's seed and the request's number.
        max_tokens: Generate at most this many tokens. At least 1.
        ignore_eos: Do not stop at the model's end-of-sequence tokens.
        stop: Strings that end the text; they are not part of it. A single string is taken as one stop string.
        stop_token_ids: Tokens that end the sequence beside the model's own.

    Raises:
        InvalidRequestError: a value is out of its bounds or of the wrong type.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, low=0.0, high=MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, low=0.0, high=1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be in (0, 1], got 0; for greedy decoding use temperature=0")
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        _check_number(
            "repetition_penalty", self.repetition_penalty, low=MIN_REPETITION_PENALTY, high=MAX_REPETITION_PENALTY
        )
        _check_number("presence_penalty", self.presence_penalty, low=-MAX_PENALTY, high=MAX_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, low=-MAX_PENALTY, high=MAX_PENALTY)
        check_int("top_k", self.top_k, low=-1)
        if self.top_k == 0:
            raise InvalidRequestError("top_k must be at least 1, or -1 to keep all tokens, got 0")
        if self.top_k > MAX_TOP_K:
            raise InvalidRequestError(f"top_k must be at most {MAX_TOP_K}, got {self.top_k}; -1 keeps all tokens")
        check_int("max_tokens", self.max_tokens, low=1)
        if self.seed is not None:
            check_int("seed", self.seed, low=0)
            if self.seed > MAX_SEED:
                raise InvalidRequestError(f"seed must be at most {MAX_SEED} (2**63 - 1), got {self.seed}")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequestError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        stop = _as_tuple("stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError(f"stop must hold non-empty strings, got {text!r}")
        object.__setattr__(self, "stop", stop)
        token_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        for token_id in token_ids:
            check_int("stop_token_ids", token_id, low=0)
        object.__setattr__(self, "stop_token_ids", token_ids)

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken and nothing is drawn."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True when the choice depends on the tokens seen so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def check_int(name: str, value: object, *, low: int) -> None:
    """Raise `InvalidRequestError` unless ``value`` is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise InvalidRequestError(f"{name} must be at least {low}, got {value}")


def _check_number(name: str, value: object, *, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be finite and between {low:g} and {high:.12g}, got {value}")


def _as_tuple(name: str, values: object) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise InvalidRequestError(f"{name} must be a list, got {values!r}")
    return tuple(values)
