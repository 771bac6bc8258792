"""Whose turn it is while rows decode. Chunks are tested with the scheduler."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.prefill import PrefillShare
from tests.hypothesis_profiles import PROPERTY

MS = st.floats(0.1, 50.0)


def decode_steps(share: PrefillShare, ms: float) -> int:
    """Steps of ``ms`` that are run before prefill is due again."""
    count = 0
    while share.is_ahead and share.is_decode_due(ms):
        share.decoded(ms)
        count += 1
    return count


def test_prefill_goes_first_at_first() -> None:
    share = PrefillShare(0.5)
    assert not share.is_ahead and not share.is_decode_due(1.0)


@pytest.mark.parametrize(
    ("share", "prefill_ms", "decode_ms", "steps"),
    [
        (0.5, 10.0, 1.0, 10),
        (0.5, 10.0, 4.1, 2),  # 2.4
        (0.5, 10.0, 3.9, 3),  # 2.6
        (0.5, 1.0, 40.0, 1),  # 0.025: one all the same
        (0.97, 16.4, 2.0, 1),  # 0.25
        (0.97, 16.4, 0.1, 5),  # 5.1
        (0.2, 10.0, 20.0, 2),
        (1.0, 10.0, 0.1, 0),  # prompts go first
    ],
)
def test_decode_gets_its_share_in_whole_steps(share: float, prefill_ms: float, decode_ms: float, steps: int) -> None:
    """Rounded to the nearest number of steps, and at least one."""
    turns = PrefillShare(share)
    turns.prefilled(prefill_ms)
    assert decode_steps(turns, decode_ms) == steps


def test_what_rounding_leaves_to_decode_is_not_forgotten() -> None:
    """2.4 steps each time: 2, then 2.8."""
    turns = PrefillShare(0.5)
    counts = []
    for _ in range(2):
        turns.prefilled(12.0)
        counts.append(decode_steps(turns, 5.0))
    assert counts == [2, 3]


def test_what_decode_had_beyond_its_share_is_not_saved_up() -> None:
    turns = PrefillShare(0.5)
    for _ in range(100):
        turns.decoded(5.0)
    turns.prefilled(12.0)
    assert decode_steps(turns, 5.0) == 2


def test_nobody_is_owed_a_step_once_nobody_decodes() -> None:
    turns = PrefillShare(0.5)
    turns.prefilled(100.0)
    turns.reset()
    assert not turns.is_ahead and not turns.is_decode_due(1.0)


@PROPERTY
@given(st.floats(0.05, 0.99), st.lists(st.tuples(MS, MS), min_size=1, max_size=40))
def test_prefill_has_no_more_than_its_share(share: float, rounds: list[tuple[float, float]]) -> None:
    """But for half a decode step, to which it is rounded; and there is a decode step in every round."""
    turns = PrefillShare(share)
    prefill = decode = 0.0
    for prefill_ms, decode_ms in rounds:
        turns.prefilled(prefill_ms)
        count = decode_steps(turns, decode_ms)
        assert count >= 1
        prefill, decode = prefill + prefill_ms, decode + count * decode_ms
        assert prefill * (1 - share) <= (decode + decode_ms / 2) * share + 1e-6
