"""SamplingParams: the documented defaults, and every value out of bounds refused with the value and the bound."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.exceptions import InvalidRequestError
from mini_infer.sampling import MAX_SEED, MAX_TEMPERATURE, SamplingParams
from tests.hypothesis_profiles import PROPERTY


def test_the_users_example_and_the_documented_defaults() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, max_tokens=100)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.8, 0.95, 50, 100)
    default = SamplingParams()
    assert (default.temperature, default.top_p, default.top_k, default.max_tokens) == (1.0, 1.0, -1, 16)
    assert (default.repetition_penalty, default.presence_penalty, default.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (default.min_p, default.seed, default.ignore_eos, default.stop, default.stop_token_ids) == (
        0.0,
        None,
        False,
        (),
        (),
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be finite and between 0 and 1000000, got -0.1"),
        ("temperature", math.inf, "temperature must be finite and between 0 and 1000000, got inf"),
        ("temperature", math.nan, "temperature must be finite and between 0 and 1000000, got nan"),
        ("temperature", 1000001, "temperature must be finite and between 0 and 1000000, got 1000001"),
        ("temperature", 10**400, "temperature must be finite and between 0 and 1000000, got 1000"),
        ("temperature", "hot", "temperature must be a number, got 'hot'"),
        ("temperature", True, "temperature must be a number, got True"),
        ("temperature", None, "temperature must be a number, got None"),
        ("top_p", 0, r"top_p must be in \(0, 1\], got 0"),
        ("top_p", -0.5, "top_p must be finite and between 0 and 1, got -0.5"),
        ("top_p", 1.01, "top_p must be finite and between 0 and 1, got 1.01"),
        ("top_p", math.nan, "top_p must be finite and between 0 and 1, got nan"),
        ("top_p", "all", "top_p must be a number, got 'all'"),
        ("min_p", -0.01, "min_p must be finite and between 0 and 1, got -0.01"),
        ("min_p", 1.5, "min_p must be finite and between 0 and 1, got 1.5"),
        ("repetition_penalty", 0, "repetition_penalty must be finite and between 0.01 and 100, got 0"),
        ("repetition_penalty", 101, "repetition_penalty must be finite and between 0.01 and 100, got 101"),
        ("presence_penalty", -2.1, "presence_penalty must be finite and between -2 and 2, got -2.1"),
        ("presence_penalty", True, "presence_penalty must be a number, got True"),
        ("frequency_penalty", 2.5, "frequency_penalty must be finite and between -2 and 2, got 2.5"),
        ("frequency_penalty", math.nan, "frequency_penalty must be finite and between -2 and 2, got nan"),
        ("top_k", 0, "top_k must be at least 1, or -1 to keep all tokens, got 0"),
        ("top_k", -2, "top_k must be at least -1, got -2"),
        ("top_k", 2**31, "top_k must be at most 2147483647, got 2147483648; -1 keeps all tokens"),
        ("top_k", 5.0, "top_k must be an integer, got 5.0"),
        ("top_k", True, "top_k must be an integer, got True"),
        ("max_tokens", 0, "max_tokens must be at least 1, got 0"),
        ("max_tokens", -1, "max_tokens must be at least 1, got -1"),
        ("max_tokens", 1.5, "max_tokens must be an integer, got 1.5"),
        ("max_tokens", None, "max_tokens must be an integer, got None"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("seed", MAX_SEED + 1, rf"seed must be at most {MAX_SEED} \(2\*\*63 - 1\), got {MAX_SEED + 1}"),
        ("seed", 0.5, "seed must be an integer, got 0.5"),
        ("ignore_eos", 1, "ignore_eos must be True or False, got 1"),
        ("stop", "", "stop must hold non-empty strings, got ''"),
        ("stop", ["a", ""], "stop must hold non-empty strings, got ''"),
        ("stop", [1], "stop must hold non-empty strings, got 1"),
        ("stop", 1, "stop must be a list, got 1"),
        ("stop", None, "stop must be a list, got None"),
        ("stop_token_ids", [-1], "stop_token_ids must be at least 0, got -1"),
        ("stop_token_ids", ["a"], "stop_token_ids must be an integer, got 'a'"),
        ("stop_token_ids", [True], "stop_token_ids must be an integer, got True"),
        ("stop_token_ids", 2, "stop_token_ids must be a list, got 2"),
    ],
)
def test_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 1e6),
        ("top_p", 1),
        ("top_p", 1e-6),
        ("min_p", 0),
        ("min_p", 1.0),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2),
        ("top_k", -1),
        ("top_k", 1),
        ("top_k", 2**31 - 1),
        ("max_tokens", 1),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("stop_token_ids", (0,)),
    ],
)
def test_the_bounds_themselves_are_allowed(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


NUMBERS = st.one_of(st.floats(), st.integers(-(2**20), 2**20))


@PROPERTY
@given(NUMBERS, NUMBERS, st.integers(-5, 5), NUMBERS)
def test_what_is_accepted_is_in_bounds(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    """Either refused by our own error, or a value that the sampler can work with."""
    try:
        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    except InvalidRequestError:
        in_bounds = 0 <= temperature <= MAX_TEMPERATURE and 0 < top_p <= 1 and 0 <= min_p <= 1
        assert not (in_bounds and (top_k == -1 or top_k >= 1)), "refused without reason"
        return
    assert 0 <= params.temperature <= MAX_TEMPERATURE
    assert 0 < params.top_p <= 1 and 0 <= params.min_p <= 1 and (params.top_k == -1 or params.top_k >= 1)


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_each_penalty_counts(name: str) -> None:
    assert SamplingParams(**{name: 0.5}).has_penalties and not SamplingParams().has_penalties


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-3).greedy and not SamplingParams().greedy


def test_stop_is_kept_as_a_tuple_of_strings() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "bc"]).stop == ("a", "bc")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert set(SamplingParams(stop_token_ids={3, 4}).stop_token_ids) == {3, 4}


def test_a_list_that_is_changed_later_changes_nothing() -> None:
    words, ids = ["a"], [1]
    params = SamplingParams(stop=words, stop_token_ids=ids)
    words.append("b")
    ids.append(2)
    assert params.stop == ("a",) and params.stop_token_ids == (1,)


def test_unknown_and_positional_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]


def test_frozen_hashable_comparable() -> None:
    params = SamplingParams(stop=["a"])
    with pytest.raises(FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
    assert params == SamplingParams(stop="a") and hash(params) == hash(SamplingParams(stop="a"))
    assert pickle.loads(pickle.dumps(params)) == params


def test_replace_checks_again() -> None:
    params = replace(SamplingParams(), max_tokens=5)
    assert params.max_tokens == 5
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        replace(params, max_tokens=0)


def test_every_field_is_described() -> None:
    """The docstring is the user's reference."""
    attributes = (SamplingParams.__doc__ or "").split("Attributes:")[1]
    for field in fields(SamplingParams):
        assert f"\n        {field.name}: " in attributes, f"{field.name} is not described"
