"""From what a user passes in to a request: checked, numbered, seeded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mini_infer.exceptions import InvalidRequestError
from mini_infer.intake import RequestIntake, as_batch, require_tokenizer
from mini_infer.sampling import MAX_SEED, SamplingParams
from mini_infer.tokenizer import Tokenizer
from tests.hypothesis_profiles import PROPERTY
from tests.tiny_tokenizers import tiny_byte_level_tokenizer

TOKENIZER = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=tiny_byte_level_tokenizer(), eos_token="</s>"))
PARAMS = SamplingParams()


def intake_of(tokenizer: Tokenizer | None = TOKENIZER, **options: Any) -> RequestIntake:
    defaults: dict[str, Any] = {"vocab_size": 320, "eos_token_ids": frozenset({1}), "max_model_len": 32, "seed": 0}
    return RequestIntake(tokenizer, **{**defaults, **options})


# One prompt or many


@pytest.mark.parametrize(
    "prompts, batch",
    [
        ("text", ["text"]),
        ("", [""]),
        ([5, 6], [[5, 6]]),
        ((5, 6), [(5, 6)]),
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ([(5,), "a"], [(5,), "a"]),
        ([[]], [[]]),
        ([], []),
        (range(3, 6), [range(3, 6)]),
    ],
)
def test_batches(prompts: Any, batch: list[Any]) -> None:
    """A string is one prompt, a list of integers is one prompt, any other list is many."""
    assert as_batch(prompts) == batch


@pytest.mark.parametrize("prompts", [None, 5, 1.5, b"bytes", bytearray(b"x"), {"a": 1}, {1, 2}, iter("a"), object()])
def test_what_is_no_batch(prompts: Any) -> None:
    """Named, with what is taken."""
    with pytest.raises(InvalidRequestError, match="prompts must be a string, a list of token ids or a list of those"):
        as_batch(prompts)


# Requests


def test_a_text() -> None:
    """Its tokens are the tokenizer's."""
    request = intake_of().make("the cat", PARAMS)
    assert request.prompt_token_ids == tuple(TOKENIZER.encode("the cat"))
    assert request.sampling is PARAMS


@pytest.mark.parametrize("prompt", [[0, 319], (0, 319), [319]])
def test_token_ids(prompt: Any) -> None:
    """Both ends of the vocabulary; a copy, which a later change of the user's list does not reach."""
    request = intake_of().make(prompt, PARAMS)
    assert request.prompt_token_ids == tuple(prompt)


def test_integers_of_numpy() -> None:
    """They are integers like others, and become Python's."""
    prompt = list(np.array([0, 319]))
    assert as_batch(prompt) == [prompt]
    token_ids = intake_of().make(prompt, PARAMS).prompt_token_ids
    assert token_ids == (0, 319) and {type(token_id) for token_id in token_ids} == {int}


@pytest.mark.parametrize("length", [1, 31])
def test_lengths_that_fit(length: int) -> None:
    """Up to one less than max_model_len, so that one token can be generated."""
    assert len(intake_of().make([5] * length, PARAMS).prompt_token_ids) == length


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "empty"),
        ([], "empty"),
        ([5] * 32, "32 tokens, but max_model_len=32 allows at most 31"),
        ("abc" * 100, "max_model_len=32 allows at most 31"),
        ([320], "between 0 and 319"),
        ([2**70], "between 0 and 319"),
        ([-1], "between 0 and 319"),
        (["a"], "integers, got 'a'"),
        ([5.0], r"integers, got 5\.0"),
        ([True], "integers, got True"),
        (b"text", "string or a list"),
        (bytearray(b"text"), "string or a list"),
        (7, "string or a list"),
        (None, "string or a list"),
        (iter([5]), "string or a list"),
        ("\udc80", "cannot be encoded"),
    ],
)
def test_refused(prompt: Any, message: str) -> None:
    """With the value and the bound; a number is not used up, so nothing of later requests changes."""
    intake = intake_of()
    with pytest.raises(InvalidRequestError, match=message):
        intake.make(prompt, PARAMS)
    fresh = intake_of()
    assert intake.make([5], PARAMS).seed == fresh.make([5], PARAMS).seed


def test_a_text_outside_the_vocabulary() -> None:
    """A tokenizer that knows more tokens than the model has rows."""
    with pytest.raises(InvalidRequestError, match="between 0 and 49"):
        intake_of(vocab_size=50).make("zzz", PARAMS)


def test_without_a_tokenizer() -> None:
    """Token ids only, and no stop strings."""
    intake = intake_of(None)
    assert intake.make([5], PARAMS).prompt_token_ids == (5,)
    with pytest.raises(InvalidRequestError, match="no tokenizer: give prompts as lists of token ids"):
        intake.make("text", PARAMS)
    with pytest.raises(InvalidRequestError, match=r"stop strings need a tokenizer.*use stop_token_ids"):
        intake.make([5], SamplingParams(stop="x"))
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        require_tokenizer(None)
    assert require_tokenizer(TOKENIZER) is TOKENIZER


@pytest.mark.parametrize(
    "params, expected",
    [
        ({}, {1, 2}),
        ({"ignore_eos": True}, set()),
        ({"stop_token_ids": [7, 8]}, {1, 2, 7, 8}),
        ({"stop_token_ids": [7], "ignore_eos": True}, {7}),
        ({"stop_token_ids": [1], "ignore_eos": True}, {1}),
    ],
)
def test_stop_tokens(params: dict[str, Any], expected: set[int]) -> None:
    """The model's own, unless ignored, and the user's; the latter even where they are the same."""
    intake = intake_of(eos_token_ids=frozenset({1, 2}))
    assert intake.make([5], SamplingParams(**params)).stop_token_ids == expected


# Ids and seeds


def test_ids_are_unique() -> None:
    intake = intake_of()
    assert len({intake.make([5], PARAMS).request_id for _ in range(1000)}) == 1000


@pytest.mark.parametrize("seed", [0, 1, 2**40, MAX_SEED])
def test_own_seeds_are_kept(seed: int) -> None:
    assert intake_of(seed=3).make([5], SamplingParams(seed=seed)).seed == seed


@PROPERTY
@given(seed=st.integers(0, 2**100))
def test_given_seeds(seed: int) -> None:
    """Requests without a seed: in range, all different, and the same again for the same engine seed."""
    first, second = (intake_of(seed=seed) for _ in range(2))
    seeds = [first.make([5], PARAMS).seed for _ in range(50)]
    assert seeds == [second.make([5], PARAMS).seed for _ in range(50)]
    assert len(set(seeds)) == 50
    assert all(0 <= value <= MAX_SEED for value in seeds)


def test_neighbouring_engines_share_no_seeds() -> None:
    """Engine seeds 0, 1, 2, ... are what people use."""
    intakes = [intake_of(seed=seed) for seed in range(20)]
    seeds = {intake.make([5], PARAMS).seed for intake in intakes for _ in range(200)}
    assert len(seeds) == 20 * 200
