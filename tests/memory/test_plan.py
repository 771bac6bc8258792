"""Where the memory goes: arithmetic that adds up, and errors that name a way out that works."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.exceptions import OutOfMemoryError
from mini_infer.memory.plan import CONTEXT_BYTES, GIB, SPARE_BYTES, MemoryPlan, gpu_budget, plan_memory
from tests.hypothesis_profiles import PROPERTY

BASE: dict[str, Any] = {
    "device": "a device",
    "total": 1000,
    "budget": 900,
    "weights": 300,
    "workspace": 100,
    "graphs": 50,
    "block_bytes": 10,
    "block_size": 4,
    "num_gpu_blocks": None,
    "num_cpu_blocks": 3,
    "max_model_len": 40,
}


def plan(**changes: Any) -> MemoryPlan:
    return plan_memory(**{**BASE, **changes})


def test_the_kv_cache_gets_the_rest() -> None:
    """450 bytes are left: 45 blocks, one of which is the null block."""
    made = plan()
    assert (made.num_gpu_blocks, made.kv_cache, made.reserve) == (44, 450, 0)
    assert (made.num_cpu_blocks, made.swap) == (3, 30)


@pytest.mark.parametrize("left, blocks", [(119, 10), (120, 11), (129, 11), (130, 12)])
def test_whole_blocks_only(left: int, blocks: int) -> None:
    """A part of a block is reserve."""
    made = plan(budget=450 + left)
    assert made.num_gpu_blocks == blocks
    assert made.reserve == left - (blocks + 1) * 10 >= 0


def test_most_blocks_caps_only_what_was_not_asked_for() -> None:
    """A CPU takes no more than all sequences could fill; a number that the user gave is honoured above that."""
    assert plan(most_blocks=20).num_gpu_blocks == 20
    assert plan(most_blocks=20, num_gpu_blocks=30).num_gpu_blocks == 30
    assert plan(most_blocks=99).num_gpu_blocks == 44


def test_blocks_that_were_asked_for() -> None:
    """As many as fit, the null block on top, and not one more."""
    made = plan(num_gpu_blocks=44)
    assert (made.num_gpu_blocks, made.reserve) == (44, 0)
    with pytest.raises(OutOfMemoryError, match=r"num_gpu_blocks=45 does not fit on a device.*= 44 KV cache blocks"):
        plan(num_gpu_blocks=45)


def test_one_sequence_must_fit() -> None:
    """40 tokens take 10 blocks: with 9 the error names the need, what is there, and the ways out."""
    assert plan(budget=450 + 110).num_gpu_blocks == 10
    with pytest.raises(OutOfMemoryError) as raised:
        plan(budget=450 + 109)
    message = str(raised.value)
    for part in (
        "max_model_len=40",
        "takes 10 blocks",
        "there are 9",
        "at most 36 fits",
        "gpu_memory_utilization",
        "smaller model",
    ):
        assert part in message


def test_too_few_blocks_asked_for() -> None:
    """When the user's own number is the cause, the error names it: more memory would not help."""
    with pytest.raises(OutOfMemoryError, match=r"max_model_len=40.*raise num_gpu_blocks") as raised:
        plan(num_gpu_blocks=9)
    assert "at most 36 fits" in str(raised.value)


def test_weights_that_fill_the_budget() -> None:
    """Nothing left, or less than nothing: no negative number of blocks anywhere in the message."""
    for weights in (750, 800, 5000):
        with pytest.raises(OutOfMemoryError, match=r"leaves 0.00 GiB = 0 KV cache blocks") as raised:
            plan(weights=weights)
        assert not re.search(r"-\d", str(raised.value))


def test_it_is_a_memory_error() -> None:
    """Users catch it as the reference shows, or as Python's own."""
    with pytest.raises(MemoryError):
        plan(budget=0)


sizes = st.integers(0, 10_000)


@PROPERTY
@given(
    budget=sizes,
    weights=sizes,
    workspace=sizes,
    graphs=sizes,
    block_bytes=st.integers(1, 500),
    block_size=st.sampled_from([1, 2, 16, 256]),
    num_gpu_blocks=st.none() | st.integers(1, 300),
    max_model_len=st.integers(1, 600),
    most_blocks=st.none() | st.integers(1, 300),
)
def test_a_plan_adds_up_or_is_refused(**values: Any) -> None:
    """The parts are the budget, the pool holds one sequence, no block that fits is left out; else an error whose
    bound on max_model_len works."""
    left = values["budget"] - values["weights"] - values["workspace"] - values["graphs"]
    try:
        made = plan(**values)
    except OutOfMemoryError as error:
        bound = re.search(r"max_model_len \(at most (\d+) fits\)", str(error))
        if bound is None:  # then it is the number of blocks that does not fit
            assert (values["num_gpu_blocks"] + 1) * values["block_bytes"] > max(left, 0)
        elif int(bound[1]):
            assert int(bound[1]) < values["max_model_len"]
            assert plan(**{**values, "max_model_len": int(bound[1])}).reserve >= 0
        return
    assert made.weights + made.workspace + made.graphs + made.kv_cache + made.reserve == made.budget
    assert made.reserve >= 0
    assert made.num_gpu_blocks * made.block_size >= values["max_model_len"]
    assert made.kv_cache == (made.num_gpu_blocks + 1) * values["block_bytes"]
    if values["num_gpu_blocks"] is not None:
        assert made.num_gpu_blocks == values["num_gpu_blocks"]
    elif made.num_gpu_blocks != values["most_blocks"]:
        assert made.reserve < values["block_bytes"]


def test_describe() -> None:
    """Every part has its line with its size; the figures shown add up to the budget."""
    made = plan_memory(
        **{
            **BASE,
            "total": 80 * GIB,
            "budget": 72 * GIB,
            "weights": 16 * GIB,
            "workspace": 2 * GIB,
            "graphs": GIB,
            "block_bytes": GIB // 512,
            "block_size": 16,
            "max_model_len": 8192,
            "num_gpu_blocks": 20479,
            "num_cpu_blocks": 512,
        }
    )
    lines = {line[:11].strip(): float(line[11:20]) for line in made.describe().splitlines()}
    assert lines["weights"] + lines["graphs"] + lines["workspace"] + lines["KV cache"] + lines["reserve"] == 72
    assert lines == {
        "weights": 16, "graphs": 1, "workspace": 2, "KV cache": 40, "reserve": 13, "budget": 72, "swap (CPU)": 1,
    }  # fmt: skip
    assert "20479 blocks of 16 tokens = 327,664 tokens" in made.describe()
    assert "of 80.00 GiB on a device" in made.describe()
    uncounted = replace(made, weights=0).describe().splitlines()
    assert uncounted[0].startswith("graphs") and len(uncounted) == len(lines) - 1


# The budget on a GPU


def budget(free: float, *, held: float = 0.0, utilization: float) -> tuple[float, float]:
    """Of a GPU of 80 GiB, in GiB."""
    total = 80 * GIB
    made = gpu_budget(total=total, free=int(free * GIB), held=int(held * GIB), utilization=utilization)
    return made[0] / GIB, made[1] / GIB


def test_a_gpu_of_its_own() -> None:
    """The share is of all that is in use: the CUDA context is within it, what the engine holds already is no loss."""
    assert budget(79.5, utilization=0.5) == (39.5, 0.5)
    assert budget(59.5, held=20.0, utilization=0.5) == (39.5, 0.5)


def test_engines_side_by_side() -> None:
    """Each has the share that it asked for, whoever came first: two of 0.45 fit."""
    context = CONTEXT_BYTES / GIB
    assert budget(79.5 - 36, utilization=0.45) == (36 - context, 36.5)
    assert budget(79.5 - 36 - 10, held=10, utilization=0.45) == (36 - context, 36.5)


def test_what_is_not_there_cannot_be_had() -> None:
    """What others leave is the most, and a little of it stays free for them."""
    assert budget(20.0, utilization=0.9) == (20.0 - SPARE_BYTES / GIB, 60.0)
    assert budget(15.0, held=5.0, utilization=0.9) == (20.0 - SPARE_BYTES / GIB, 60.0)
    assert budget(0.25, utilization=0.9)[0] < 0


@PROPERTY
@given(st.integers(0, 80), st.integers(0, 80), st.floats(0.01, 1.0))
def test_within_the_share_and_within_the_gpu(free: int, held: int, utilization: float) -> None:
    """Never more than the share with a context of the usual size, and never more than is there."""
    held = min(held, 80 - free)
    made, others = budget(free, held=held, utilization=utilization)
    assert others == 80 - free - held
    assert made <= free + held
    assert made + min(others, CONTEXT_BYTES / GIB) <= 80 * utilization + 1e-6
