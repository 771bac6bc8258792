"""EngineConfig: the documented options and defaults, and every value out of bounds refused by name."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from mini_infer.config import BUCKET_POLICIES, DEVICES, DTYPES, LOAD_FORMATS, PREEMPTION_MODES, EngineConfig
from mini_infer.exceptions import ConfigError

INTEGERS_FROM_ONE = (
    "max_num_seqs",
    "max_model_len",
    "block_size",
    "num_gpu_blocks",
    "max_prefill_tokens",
    "max_prefill_seqs",
    "steps_in_flight",
)
INTEGERS_FROM_ZERO = ("seed", "num_cpu_blocks")
FRACTIONS = ("gpu_memory_utilization", "prefill_share")
FLAGS = (
    "trust_remote_code",
    "enable_prefix_caching",
    "capture_graphs",
    "measure_costs",
    "measure_steps",
    "progress",
)
CHOICES = {
    "dtype": DTYPES,
    "device": DEVICES,
    "load_format": LOAD_FORMATS,
    "preemption": PREEMPTION_MODES,
    "bucket_policy": BUCKET_POLICIES,
}
TEXTS = ("model", "tokenizer")
BUCKETS = ("decode_buckets", "prefill_buckets")


def make(**options: Any) -> EngineConfig:
    return EngineConfig(**{"model": "some/model", **options})


def test_the_users_example() -> None:
    config = EngineConfig(
        model="meta-llama/Llama-2-7b-hf",
        tokenizer="meta-llama/Llama-2-7b-hf",
        max_num_seqs=64,
        max_model_len=2048,
        block_size=16,
        gpu_memory_utilization=0.9,
        dtype="float16",
    )
    assert config.model == config.tokenizer == "meta-llama/Llama-2-7b-hf"
    assert (config.max_num_seqs, config.max_model_len, config.block_size) == (64, 2048, 16)


def test_the_documented_defaults() -> None:
    config = make()
    assert config.tokenizer is None, "None stands for the model's"
    assert config.max_num_seqs == 256
    assert config.max_model_len is None, "None stands for the model config's"
    assert config.block_size == 16
    assert config.gpu_memory_utilization == 0.9
    assert config.dtype == "float16"
    assert config.trust_remote_code is False


def test_every_option_is_tested_here_and_described() -> None:
    """A new option without bounds, a test and a line in the docstring is noticed."""
    tested = {
        *INTEGERS_FROM_ONE,
        *INTEGERS_FROM_ZERO,
        *FRACTIONS,
        *FLAGS,
        *CHOICES,
        *TEXTS,
        *BUCKETS,
        "swap_space_gib",
    }
    assert {field.name for field in fields(EngineConfig)} == tested
    attributes = (EngineConfig.__doc__ or "").split("Attributes:")[1]
    for name in tested:
        assert f"\n        {name}: " in attributes, f"{name} is not described"


def test_model_is_needed_and_unknown_keywords_are_type_errors() -> None:
    with pytest.raises(TypeError, match="model"):
        EngineConfig()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_num_seq"):
        make(max_num_seq=4)


def test_a_path_is_a_name() -> None:
    config = EngineConfig(model=Path("some/model"), tokenizer=Path("another"))  # type: ignore[arg-type]
    assert (config.model, config.tokenizer) == ("some/model", "another")


@pytest.mark.parametrize("name", INTEGERS_FROM_ONE)
def test_integers_from_one(name: str) -> None:
    assert getattr(make(**{name: 1}), name) == 1
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"^{name} must be at least 1, got {value}"):
            make(**{name: value})


@pytest.mark.parametrize("name", INTEGERS_FROM_ZERO)
def test_integers_from_zero(name: str) -> None:
    assert getattr(make(**{name: 0}), name) == 0
    with pytest.raises(ConfigError, match=f"^{name} must be at least 0, got -1"):
        make(**{name: -1})


@pytest.mark.parametrize("name", INTEGERS_FROM_ONE + INTEGERS_FROM_ZERO)
@pytest.mark.parametrize("value", [2.0, "2", True], ids=repr)
def test_integers_are_integers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be an integer, got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("block_size", [3, 12, 24, 257, 512])
def test_block_size_is_a_power_of_two(block_size: int) -> None:
    with pytest.raises(ConfigError, match=f"block_size must be a power of two of at most 256, got {block_size}"):
        make(block_size=block_size)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_block_sizes(block_size: int) -> None:
    assert make(block_size=block_size).block_size == block_size


@pytest.mark.parametrize("name", FRACTIONS)
def test_fractions(name: str) -> None:
    for value in (0.01, 1, 1.0):
        assert getattr(make(**{name: value}), name) == value
    for value in (0, 0.0, -0.1, 1.01, math.nan, math.inf, "half", True, None):
        with pytest.raises(ConfigError, match=rf"^{name} must be in \(0, 1\], got {value!r}"):
            make(**{name: value})


@pytest.mark.parametrize("value", [-1, math.inf, math.nan, "1", True])
def test_swap_space(value: Any) -> None:
    assert make(swap_space_gib=0).swap_space_gib == 0
    with pytest.raises(ConfigError, match=r"^swap_space_gib must be a finite number of at least 0"):
        make(swap_space_gib=value)


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    for value in CHOICES[name]:
        assert getattr(make(**{name: value}), name) == value
    for value in ("no such thing", None, 1, []):
        with pytest.raises(ConfigError) as error:
            make(**{name: value})
        assert name in str(error.value) and repr(value) in str(error.value)
        assert all(choice in str(error.value) for choice in CHOICES[name]), "the choices are not named"


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    for value in (True, False):
        assert getattr(make(**{name: value}), name) is value
    for bad in (1, 0, "yes", None):
        with pytest.raises(ConfigError, match=f"^{name} must be True or False, got {bad!r}"):
            make(**{name: bad})


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", ["", 3, b"model"], ids=repr)
def test_texts(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be a non-empty string, got"):
        make(**{name: value})


@pytest.mark.parametrize("name", BUCKETS)
def test_buckets_are_sorted_without_doubles_and_frozen(name: str) -> None:
    sizes = [8, 1, 4, 4]
    config = make(**{name: sizes})
    sizes.append(99)
    assert getattr(config, name) == (1, 4, 8)
    assert getattr(make(**{name: (5,)}), name) == (5,)
    assert getattr(make(), name) is None


@pytest.mark.parametrize("name", BUCKETS)
@pytest.mark.parametrize("value", [[], (), "1,2", 5, {1, 2}, [0], [1, -2], [1.5], [True], ["4"]], ids=repr)
def test_bad_buckets(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        make(**{name: value})


@pytest.mark.parametrize(
    "name", ["tokenizer", "max_model_len", "num_gpu_blocks", "max_prefill_tokens", "num_cpu_blocks", "steps_in_flight"]
)
def test_none_stands_for_the_default(name: str) -> None:
    assert getattr(make(**{name: None}), name) is None


def test_the_largest_seed() -> None:
    """What a 64-bit generator takes, as for a request's own."""
    assert EngineConfig(model="x", seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ConfigError, match="seed must be at most"):
        EngineConfig(model="x", seed=2**63)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_prefill_seqs", "block_size", "seed", "model"])
def test_none_is_no_value_for_the_others(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        make(**{name: None})


def test_frozen_hashable_comparable() -> None:
    config = make(decode_buckets=[1, 2])
    with pytest.raises(FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert config == make(decode_buckets=(2, 1)) and hash(config) == hash(make(decode_buckets=(2, 1)))
    assert pickle.loads(pickle.dumps(config)) == config
