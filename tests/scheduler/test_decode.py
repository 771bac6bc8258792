"""Decode steps: rows, steps in flight, ends, blocks given ahead, and the work of the host."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from mini_infer.output_processor import OutputProcessor
from mini_infer.request import FinishReason, Request, RequestStatus
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from mini_infer.step import ClearRow, ExtendRow, MoveRow, StepKind
from mini_infer.typing import NO_ROW
from tests.scheduler.driving import Engine, blocks_of, prompt_of
from tests.simulated_device import LOGPROB, Reference, sampled_tokens

# Decode


def test_rows_stay_dense_when_one_ends() -> None:
    """The last row moves into the hole."""
    engine = Engine()
    for name, max_tokens in (("a", 2), ("b", 9), ("c", 9)):
        engine.add(name, [ord(name)], max_tokens)
    engine.step()
    assert engine.step().request_ids == ("a", "b", "c")
    outputs = engine.step()
    assert outputs.request_ids == ("c", "b") and outputs.bucket == 2
    assert [type(edit).__name__ for edit in outputs.edits] == ["MoveRow", "ClearRow"]
    engine.finish()


def test_a_row_gets_a_block_when_it_needs_one() -> None:
    engine = Engine(block_size=4)
    engine.add("a", prompt_of(3), 8)
    engine.step()
    assert engine.step().edits == (), "the first block still has a place"
    assert engine.step().edits == (ExtendRow(0, 1, (2, 3)),), "and one ahead: as many as its longest output needs"
    engine.finish()


def test_steps_in_flight_do_not_wait_for_tokens() -> None:
    """Three decode steps are launched before the first token is read; lengths and blocks move at once."""
    engine = Engine(block_size=1)
    request = engine.add("a", [1], 10)
    for _ in range(4):
        assert engine.launch()
    assert request.output_token_ids == [] and request.num_tokens == 5
    assert engine.scheduler.metadata("a").num_computed_tokens == 4
    while engine.launched:
        engine.read_back()
    assert len(request.output_token_ids) == 4
    engine.finish()


def test_the_surplus_of_an_ended_sequence_is_dropped() -> None:
    """It ends with the first token that is read, when two more steps are in flight."""
    engine = Engine(block_size=1)
    expected = Reference([1], 10)
    a = engine.add("a", [1], 10, stop_token_ids=frozenset({expected.tokens[1]}))
    b = engine.add("b", [2], 10)
    for _ in range(3):
        engine.launch()
    assert engine.read_back() == [a, b]
    assert a.finish_reason is FinishReason.STOP and a.output_token_ids == expected.tokens[1:2]
    assert engine.read_back() == [] and engine.read_back() == [], "b just goes on"
    assert a.output_token_ids == expected.tokens[1:2] and a.cumulative_logprob == LOGPROB
    assert len(b.output_token_ids) == 3
    assert engine.scheduler.block_manager.num_cached_blocks == 1 + 1, "the surplus was cached as a prefix"
    engine.finish()
    assert engine.scheduler.block_manager.num_cached_blocks == 1 + 10


def test_fail_all_begins_anew() -> None:
    """Whoever was admitted ends, wherever it is; whoever was not is served, in blocks of which nothing is known."""
    engine = Engine(max_num_seqs=2, num_gpu_blocks=10, num_cpu_blocks=9)
    running, short, waiting = (engine.add(name, prompt_of(9), 8) for name in ("running", "short", "waiting"))
    engine.step()
    assert engine.scheduler.block_manager.num_cached_blocks > 0
    engine.launch()
    in_flight = engine.launched[0]
    assert set(engine.scheduler.fail_all("it broke")) == {running, short}
    assert [(r.finish_reason, r.error, r.row, len(r.output_token_ids)) for r in (running, short)] == [
        (FinishReason.ERROR, "it broke", NO_ROW, 1)
    ] * 2
    manager = engine.scheduler.block_manager
    assert (manager.num_used_blocks, manager.num_cached_blocks, manager.num_free_cpu_blocks) == (0, 0, 9)
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (0, 1)
    assert engine.scheduler.fail_all("again") == []
    outputs = engine.launch()
    assert [edit for edit in outputs.edits if isinstance(edit, ClearRow)] == [ClearRow(0), ClearRow(1)]
    assert engine.scheduler.update(*in_flight) == [], "nobody in it is alive"
    engine.launched.popleft()
    engine.finish()
    assert waiting.finish_reason is FinishReason.LENGTH and waiting.num_cached_tokens == 0


def test_fail_all_leaves_those_alone_that_had_ended() -> None:
    """An interrupt came just before one that had got all its tokens was struck off."""
    engine = Engine()
    request = engine.add("a", prompt_of(6), 2)
    engine.finish()
    engine.scheduler._requests["a"] = request
    assert engine.scheduler.fail_all("it broke") == []
    assert (request.finish_reason, request.error) == (FinishReason.LENGTH, None)
    assert engine.scheduler.num_unfinished == 0


def test_a_request_that_did_not_get_to_the_queue_can_be_ended() -> None:
    """An interrupt came in the middle of adding it."""
    engine = Engine()
    request = engine.add("a", prompt_of(6), 3)
    engine.scheduler._places.queue.clear()
    assert engine.scheduler.finish("a", FinishReason.ABORT) is request
    assert engine.scheduler.num_unfinished == 0 and request.finished


def test_an_id_may_be_used_again_while_steps_of_its_last_bearer_are_in_flight() -> None:
    """Their tokens, or their failure, are not taken for the new one's."""
    engine = Engine()
    engine.add("a", [1], 10)
    engine.launch()
    lost = engine.launch()
    engine.scheduler.finish("a", FinishReason.ABORT)
    again = engine.add("a", [2], 10)
    assert engine.launch().kind is StepKind.PREFILL
    assert again.slot == 0, "the slot is used again, too"
    assert engine.read_back() == []
    assert engine.scheduler.fail(lost, "it broke") == []
    engine.launched.popleft()
    assert engine.read_back() == [again]
    engine.finish()


def test_a_stop_token_is_its_requests_alone() -> None:
    engine = Engine()
    stop = Reference([1], 20).tokens[3]
    a = engine.add("a", [1], 20)
    b = engine.add("b", [1, 2], 20, stop_token_ids=frozenset({stop, 6}))
    engine.finish()
    assert a.finish_reason is FinishReason.LENGTH and stop in a.output_token_ids[:-1]
    assert b.finished


def test_more_requests_under_way_than_rows() -> None:
    """Drained and preempted ones keep their outputs while others take their rows."""
    engine = Engine(max_num_seqs=1, max_model_len=200)
    requests = [engine.add(f"r{number}", [number], 100 if number == 5 else 2) for number in range(6)]
    for _ in range(11):
        assert engine.launch(), "six prefills, five decodes"
    assert sum(request.status is RequestStatus.DRAINING for request in requests) == 5
    assert sorted(request.slot for request in requests) == [0, 1, 2, 3, 4, 5]
    engine.finish()


def test_no_step_is_launched_beyond_max_tokens() -> None:
    engine = Engine()
    engine.add("a", [1], 3)
    assert [bool(engine.launch()) for _ in range(5)] == [True, True, True, False, False]


def test_max_tokens_one_ends_with_the_prefill_and_leaves_its_row() -> None:
    engine = Engine()
    request = engine.add("a", prompt_of(5), 1)
    other = engine.add("b", prompt_of(5, first=2), 2)
    outputs = engine.launch()
    assert [chunk.row for chunk in outputs.chunks] == [0, 1], "its penalties need one"
    assert (request.status, other.row, engine.scheduler.num_running) == (RequestStatus.DRAINING, 0, 1)
    engine.read_back()
    assert request.finish_reason is FinishReason.LENGTH and len(request.output_token_ids) == 1
    assert engine.launch().edits == (MoveRow(1, 0), ClearRow(1))


def test_a_stop_token_at_the_length_limit_is_a_stop() -> None:
    engine = Engine()
    stop = Reference([1], 2).tokens[2]
    request = engine.add("a", [1], 2, stop_token_ids=frozenset({stop}))
    engine.finish()
    assert request.finish_reason is FinishReason.STOP and request.output_token_ids[-1] == stop


# The host's work in the steady state


def lines_run_by(function: Callable[[], object]) -> int:
    """Lines of Python that a call runs through, without the collector's; one in a loop counts once a turn."""
    lines = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    gc.disable()
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(before)
        gc.enable()
    return lines


def steady_step(num_seqs: int) -> Callable[[], None]:
    """Schedules a step, takes in the tokens of one, and follows them, with rows to which nothing happens."""
    scheduler, processor = Scheduler(max_num_seqs=256, max_model_len=512, block_size=256), OutputProcessor(None)
    for number in range(num_seqs):
        request = Request(f"r{number}", (number,), SamplingParams(max_tokens=400), stop_token_ids=frozenset({2}))
        scheduler.add(request)
        processor.track(request, streaming=False)
    sampled = sampled_tokens([5] * num_seqs, [LOGPROB] * num_seqs)
    outputs = scheduler.schedule()
    while (outputs.kind, outputs.num_seqs, outputs.edits) != (StepKind.DECODE, num_seqs, ()):
        scheduler.update(outputs, sampled.select(np.arange(outputs.num_seqs)))
        outputs = scheduler.schedule()

    def step() -> None:
        assert not scheduler.update(outputs, sampled) and not processor.advance()
        assert scheduler.schedule().num_seqs == num_seqs

    return step


def test_a_step_in_which_nothing_changes_costs_the_same_however_many_rows_there_are() -> None:
    """No Python is run once a row: not to schedule the step, nor to take in its tokens, nor to follow them."""
    assert lines_run_by(lambda: [number for number in range(256)]) > 256, "this test sees nothing"  # noqa: C416
    few, many = lines_run_by(steady_step(8)), lines_run_by(steady_step(256))
    assert few == many < 200


# Blocks given ahead


def test_blocks_are_given_ahead_while_there_are_plenty() -> None:
    engine = Engine(block_size=2, max_model_len=64)
    engine.add("a", [1, 2], 40)
    engine.step()
    engine.step()
    assert blocks_of(engine, "a") == 1 + 4
    edits = [bool(engine.step().edits) for _ in range(16)]
    assert edits.count(True) == 2, "one edit for 8 tokens"


def test_rows_that_need_blocks_soon_get_theirs_in_the_same_step() -> None:
    """Four rows, a token apart: they are edited together, not one in each step."""
    engine = Engine(block_size=8, max_model_len=256)
    for number in range(4):
        engine.add(f"r{number}", prompt_of(5 + number, first=number), 200)
    engine.step()
    edits = [engine.step().edits for _ in range(100)]
    assert [len(step) for step in edits if step] == [4] * 4


def test_blocks_ahead_go_before_anybody_loses_its_place() -> None:
    """16 blocks for two rows: both could be served with 8 each, though one of them had more for a while."""
    engine = Engine(block_size=1, max_model_len=10, num_gpu_blocks=16, enable_prefix_caching=False)
    engine.add("a", [1], 8)
    engine.step()
    engine.step()
    engine.step()
    assert blocks_of(engine, "a") > engine.requests["a"].num_tokens
    engine.add("b", prompt_of(2, first=2), 7)
    engine.finish()
    assert engine.scheduler.num_preemptions == {"swap": 0, "recompute": 0}


def test_blocks_ahead_do_not_keep_a_prompt_out() -> None:
    engine = Engine(block_size=1, max_model_len=16, num_gpu_blocks=16, enable_prefix_caching=False)
    engine.add("a", [1], 15)
    engine.step()
    engine.step()
    assert (blocks_of(engine, "a"), engine.requests["a"].num_tokens) == (5, 3)
    engine.add("b", prompt_of(12, first=2), 2)
    assert engine.step().request_ids == ("b",), "11 blocks were free, 12 and one for the row are needed"
    assert blocks_of(engine, "a") == 3
    engine.finish()


def test_nobody_gets_blocks_ahead_while_somebody_waits_for_blocks() -> None:
    engine = Engine(block_size=1, max_model_len=20, num_gpu_blocks=20, enable_prefix_caching=False)
    engine.add("a", prompt_of(4), 9)
    engine.step()
    engine.add("b", prompt_of(16, first=2), 1)
    while not engine.requests["a"].finished:
        assert engine.requests["b"].status is RequestStatus.WAITING
        assert blocks_of(engine, "a") <= engine.requests["a"].num_tokens
        engine.step()
    engine.finish()
