"""The decision object: truth value, counts, and that nobody can change it on the way to the runner."""

from __future__ import annotations

import dataclasses
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from mini_infer import step
from mini_infer.sampling import SamplingParams
from mini_infer.step import (
    CaptureRecord,
    ClearRow,
    ExtendRow,
    History,
    Members,
    MoveRow,
    PlaceRow,
    PrefillChunk,
    SampledTokens,
    SchedulerOutputs,
    StepKind,
)
from mini_infer.typing import NO_ROW

PARAMS = SamplingParams()


def chunk(request_id: str, start: int, num_tokens: int) -> PrefillChunk:
    return PrefillChunk(request_id, start, tuple(range(num_tokens)), (1, 2), PARAMS, seed=0, is_last=False)


def test_idle_is_falsy_and_the_others_are_not() -> None:
    assert not SchedulerOutputs(3, StepKind.IDLE)
    assert SchedulerOutputs(3, StepKind.DECODE) and SchedulerOutputs(3, StepKind.PREFILL)


def test_counts_of_a_decode_step() -> None:
    outputs = SchedulerOutputs(1, StepKind.DECODE, 4, ("a", "b", "c"))
    assert (outputs.num_seqs, outputs.num_tokens, outputs.bucket) == (3, 3, 4)


def test_counts_of_a_prefill_step() -> None:
    outputs = SchedulerOutputs(1, StepKind.PREFILL, 16, ("a", "b"), (chunk("a", 4, 5), chunk("b", 0, 6)))
    assert (outputs.num_seqs, outputs.num_tokens) == (2, 11)
    assert outputs.chunks[0].stop == 9 and outputs.chunks[1].stop == 6


def test_counts_of_an_idle_step() -> None:
    outputs = SchedulerOutputs(1, StepKind.IDLE, reason="nothing to run")
    assert (outputs.num_seqs, outputs.num_tokens, outputs.bucket) == (0, 0, 0)


def test_a_chunk_takes_no_row_unless_told() -> None:
    assert chunk("a", 0, 1).row == NO_ROW


def test_two_steps_are_the_same_whatever_the_bookkeeping_of_their_members() -> None:
    """Decisions can be compared and printed; the arrays beside them are the scheduler's own."""
    members = Members(np.array([0, 1]), np.array([5, 6]))
    outputs = SchedulerOutputs(1, StepKind.DECODE, 2, ("a", "b"), members=members)
    assert outputs == SchedulerOutputs(1, StepKind.DECODE, 2, ("a", "b"))
    assert "members" not in repr(outputs)


def test_selecting_members_and_their_tokens() -> None:
    chosen = np.array([2, 0])
    members = Members(np.array([4, 5, 6]), np.array([7, 8, 9])).select(chosen)
    assert (members.slots.tolist(), members.owners.tolist()) == ([6, 4], [9, 7])
    sampled = SampledTokens(np.array([1, 2, 3], dtype=np.int32), np.array([-1, -2, -3], dtype=np.float32)).select(
        chosen
    )
    assert (sampled.token_ids.tolist(), sampled.logprobs.tolist()) == ([3, 1], [-3.0, -1.0])


@pytest.mark.parametrize(
    "value",
    [
        SchedulerOutputs(1, StepKind.IDLE),
        chunk("a", 0, 1),
        PlaceRow(0, None, 2, (1,), PARAMS, 0),
        History((1,), ()),
        MoveRow(1, 0),
        ExtendRow(0, 1, (2,)),
        ClearRow(0),
        Members(np.array([3]), np.array([7])),
        SampledTokens(np.array([1], dtype=np.int32), np.array([0.0], dtype=np.float32)),
        CaptureRecord(StepKind.DECODE, 8, 0.01, 1 << 20),
    ],
    ids=lambda value: type(value).__name__,
)
def test_frozen(value: object) -> None:
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        with pytest.raises(FrozenInstanceError):
            setattr(value, field.name, None)


def test_everything_in_the_module_is_tested_for_being_frozen() -> None:
    classes = {value for value in vars(step).values() if isinstance(value, type)}
    defined = {cls for cls in classes if dataclasses.is_dataclass(cls) and cls.__module__ == step.__name__}
    assert defined == {
        SchedulerOutputs,
        PrefillChunk,
        History,
        PlaceRow,
        MoveRow,
        ExtendRow,
        ClearRow,
        Members,
        SampledTokens,
        CaptureRecord,
    }
