"""Prefill steps: packing, chunks, admission, the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mini_infer.buckets import BucketTable
from mini_infer.request import FinishReason, RequestStatus
from mini_infer.step import StepKind
from tests.scheduler.driving import Engine, prompt_of


def test_prompts_are_packed_into_one_step() -> None:
    engine = Engine(max_num_seqs=8)
    for number, length in enumerate((5, 3, 8)):
        engine.add(f"r{number}", prompt_of(length, first=number), 2)
    outputs = engine.step()
    assert outputs.num_tokens == 16 == outputs.bucket
    assert [(chunk.request_id, chunk.start, chunk.stop, chunk.row) for chunk in outputs.chunks] == [
        ("r0", 0, 5, 0),
        ("r1", 0, 3, 1),
        ("r2", 0, 8, 2),
    ]
    assert engine.step().num_seqs == 3


def test_chunks_fill_a_bucket_exactly() -> None:
    """20 tokens in buckets of 8 and 16, by price: 16 and 4, not 20 padded up and not 8, 8, 4."""
    engine = Engine(prefill_buckets=BucketTable([8, 16], 32, {8: 1.0, 16: 1.5, 32: 3.0}))
    engine.add("a", prompt_of(20), 1)
    sizes = [(outputs.num_tokens, outputs.bucket) for outputs in engine.finish()]
    assert sizes == [(16, 16), (4, 8)]
    assert engine.scheduler.prefill_padding.waste == pytest.approx(4 / 24)


def test_a_long_prompt_is_cut_at_the_largest_bucket() -> None:
    engine = Engine(prefill_buckets=BucketTable([4], 8))
    request = engine.add("a", prompt_of(19), 1)
    steps = engine.finish()
    assert [(step.chunks[0].start, step.chunks[0].stop) for step in steps] == [(0, 8), (8, 16), (16, 19)]
    assert [step.chunks[0].is_last for step in steps] == [False, False, True]
    assert len(request.output_token_ids) == 1


def test_the_budget_goes_to_the_oldest_first() -> None:
    engine = Engine(prefill_buckets=BucketTable([], 8))
    engine.add("a", prompt_of(12), 1)
    engine.add("b", prompt_of(2, first=2), 1)
    first, second = engine.finish()
    assert first.request_ids == ("a",) and second.request_ids == ("a", "b")


def test_max_prefill_seqs_bounds_the_chunks_of_a_step() -> None:
    engine = Engine(max_num_seqs=8, max_prefill_seqs=2)
    for number in range(5):
        engine.add(f"r{number}", [number], 1)
    assert [outputs.num_seqs for outputs in engine.finish()] == [2, 2, 1]


def test_max_num_seqs_bounds_the_rows() -> None:
    engine = Engine(max_num_seqs=2, max_model_len=16)
    for number in range(5):
        engine.add(f"r{number}", [number, number], 4)
    seen = 0
    for _ in range(40):
        engine.step()
        seen = max(seen, engine.scheduler.num_running + engine.scheduler.num_prefilling)
    assert seen == 2 and engine.scheduler.num_unfinished == 0


def test_a_prompt_waits_while_the_rows_need_the_blocks() -> None:
    """Let in on the last blocks, it would be thrown out by the next decode step."""
    engine = Engine(max_model_len=8, block_size=1, num_gpu_blocks=9, enable_prefix_caching=False)
    a = engine.add("a", [1, 2], 4)
    engine.step()
    b = engine.add("b", prompt_of(7, first=3), 1)
    assert engine.step().kind is StepKind.DECODE, "7 blocks are free, but the row may need one"
    engine.finish()
    assert a.num_preemptions == b.num_preemptions == 0


def test_a_prompt_that_waits_for_blocks_is_looked_up_when_there_may_be_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every step: that takes milliseconds where it is long. But at once when blocks come back."""
    engine = Engine(max_model_len=40, block_size=1, num_gpu_blocks=60)
    manager = engine.scheduler.block_manager
    allocate, tries = manager.allocate_sequence, []

    def counted(sequence_id: str, token_ids: Sequence[int], *, reserve: int = 0) -> int | None:
        tries.append(sequence_id)
        return allocate(sequence_id, token_ids, reserve=reserve)

    monkeypatch.setattr(manager, "allocate_sequence", counted)
    a, b = engine.add("a", prompt_of(20), 20), engine.add("b", prompt_of(20, first=2), 8)
    c = engine.add("c", prompt_of(30, first=3), 3)
    while not b.finished:
        engine.step()
        assert c.status is RequestStatus.WAITING
    before = tries.count("c")
    assert before < 6, "for as many changes: the prompts of a and b were cached, and blocks were given back"
    engine.step()
    assert (tries.count("c"), c.status, a.finished) == (before + 1, RequestStatus.RUNNING, False)
    engine.finish()


def test_a_hit_skips_what_is_in_the_cache() -> None:
    engine = Engine()
    engine.add("a", prompt_of(12), 1)
    engine.finish()
    b = engine.add("b", [*prompt_of(8), 99, 98], 1)
    outputs = engine.step()
    assert (outputs.chunks[0].start, outputs.num_tokens, b.num_cached_tokens) == (8, 2, 8)
    c = engine.add("c", prompt_of(12), 1)
    outputs = engine.step()
    assert (outputs.chunks[0].start, outputs.num_tokens, c.num_cached_tokens) == (8, 4, 8), "the last block, too"


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    """A conversation comes back with the answer in its prompt."""
    engine = Engine()
    a = engine.add("a", prompt_of(6), 7)
    engine.finish()
    b = engine.add("b", [*a.prompt_token_ids, *a.output_token_ids, 77], 1)
    engine.finish()
    assert b.num_cached_tokens == 12, "the K/V of the last token was never written, the other 12 are 3 blocks"


def test_what_was_read_back_of_an_aborted_request_is_cached_and_no_more() -> None:
    engine = Engine(block_size=1)
    a = engine.add("a", [5, 6], 20)
    for _ in range(6):
        engine.launch()
    engine.read_back()
    engine.read_back()
    assert len(a.output_token_ids) == 2
    engine.scheduler.finish("a", FinishReason.ABORT)
    assert engine.scheduler.block_manager.num_cached_blocks == 3, "the K/V of the second token is in flight"


def test_an_abort_with_the_prompt_in_flight_caches_nothing() -> None:
    """The step may still fail, and what it should have written would be found by others."""
    engine = Engine()
    engine.add("a", prompt_of(12), 2)
    outputs = engine.scheduler.schedule()
    assert outputs.chunks[0].is_last
    engine.scheduler.finish("a", FinishReason.ABORT)
    engine.device.lose(outputs)
    assert engine.scheduler.fail(outputs, "it broke") == []
    b = engine.add("b", prompt_of(12), 2)
    engine.finish()
    assert b.num_cached_tokens == 0


def test_what_a_request_that_failed_had_generated_is_not_cached() -> None:
    engine = Engine(block_size=1)
    engine.add("a", [5], 20, nan_at=4)
    engine.finish()
    assert engine.scheduler.block_manager.num_cached_blocks == 1, "its prompt, which came back without a NaN"


def test_caching_can_be_turned_off() -> None:
    engine = Engine(enable_prefix_caching=False)
    for name in ("a", "b"):
        request = engine.add(name, prompt_of(12), 1)
        engine.finish()
        assert request.num_cached_tokens == 0
    assert engine.scheduler.block_manager.num_cached_blocks == 0


def test_a_prompt_in_flight_is_not_cached_yet() -> None:
    """Its step may still fail: only what came back is offered to others."""
    engine = Engine()
    engine.add("a", prompt_of(12), 2)
    engine.launch()
    b = engine.add("b", prompt_of(12), 2)
    assert engine.launch().kind is StepKind.DECODE or b.num_cached_tokens == 0
    assert engine.scheduler.block_manager.num_cached_blocks == 0
    engine.read_back()
    assert engine.scheduler.block_manager.num_cached_blocks == 3
