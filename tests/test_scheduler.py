"""The scheduler, one decision at a time. What it does under random load is in `test_scheduler_machine.py`."""

from __future__ import annotations

import gc
import itertools
import sys
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import pytest

from mini_infer.buckets import BucketTable
from mini_infer.exceptions import ConfigError, InvalidRequestError, OutOfMemoryError
from mini_infer.output_processor import OutputProcessor
from mini_infer.request import FinishReason, Request, RequestStatus
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from mini_infer.step import ClearRow, ExtendRow, MoveRow, PlaceRow, SampledTokens, SchedulerOutputs, StepKind
from mini_infer.typing import NO_ROW
from tests.simulated_device import LOGPROB, NAN, Expected, Reference, SimulatedDevice, sampled_tokens


class Engine:
    """A scheduler with a simulated device, and requests by name. ``options`` are the scheduler's."""

    def __init__(self, **options: Any) -> None:
        options = {"max_num_seqs": 4, "max_model_len": 32, "block_size": 4, "num_cpu_blocks": 0, **options}
        self.scheduler = Scheduler(**options)
        self.expected: dict[str, Expected] = {}
        self.requests: dict[str, Request] = {}
        self.device = SimulatedDevice(
            self.expected,
            max_num_seqs=options["max_num_seqs"],
            block_size=options["block_size"],
            num_gpu_blocks=self.scheduler.block_manager.num_gpu_blocks,
            num_cpu_blocks=options["num_cpu_blocks"],
        )
        self.launched: deque[tuple[SchedulerOutputs, SampledTokens]] = deque()
        self.num_launches = 0

    def add(self, name: str, prompt: list[int], max_tokens: int, **fields: Any) -> Request:
        nan_at = fields.pop("nan_at", None)
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request(name, tuple(prompt), sampling, seed=len(self.requests), **fields)
        self.scheduler.add(request)
        reference = Reference(prompt, min(max_tokens, self.scheduler.max_model_len - len(prompt)))
        self.expected[name] = Expected(reference, sampling, request.seed, nan_at)
        self.requests[name] = request
        return request

    def launch(self) -> SchedulerOutputs:
        self.num_launches += 1
        assert self.num_launches < 1000, "it does not end"
        outputs = self.scheduler.schedule()
        if outputs:
            self.launched.append((outputs, self.device.run(outputs)))
        return outputs

    def read_back(self) -> list[Request]:
        return self.scheduler.update(*self.launched.popleft())

    def step(self) -> SchedulerOutputs:
        outputs = self.launch()
        if self.launched:
            self.read_back()
        return outputs

    def finish(self) -> list[SchedulerOutputs]:
        """Steps until nothing is left."""
        steps = []
        while self.scheduler.num_unfinished:
            steps.append(self.step())
        for name, request in self.requests.items():
            expected = self.expected[name]
            if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                result = expected.reference.result(request.stop_token_ids, expected.nan_at)
                assert (request.output_token_ids, request.finish_reason) == result
        return steps


def prompt_of(length: int, first: int = 1) -> list[int]:
    """A prompt that shares no prefix with one of another ``first``."""
    return [first, *range(10, 9 + length)]


# The user's contract


def test_the_users_example() -> None:
    scheduler = Scheduler(max_num_seqs=64, max_model_len=2048, block_size=16)
    scheduled_seqs = scheduler.schedule()
    assert isinstance(scheduled_seqs, SchedulerOutputs)
    assert not scheduled_seqs
    assert scheduler.block_manager.num_gpu_blocks == 64 * 128, "enough for every sequence at its longest"
    scheduler.add(Request("a", (1, 2, 3), SamplingParams()))
    assert scheduler.schedule().kind is StepKind.PREFILL


def test_idle_says_so_and_counts_no_step() -> None:
    engine = Engine()
    idle = engine.scheduler.schedule()
    assert idle.kind is StepKind.IDLE and idle.num_seqs == 0 and not idle.edits
    assert idle.reason == "nothing to run"
    engine.add("a", [1], 2)
    assert engine.launch().step == 1


def test_a_request_from_queue_to_end() -> None:
    engine = Engine()
    request = engine.add("a", prompt_of(6), 3)
    assert request.status is RequestStatus.WAITING and engine.scheduler.num_waiting == 1
    prefill = engine.launch()
    assert prefill.request_ids == ("a",) and prefill.num_tokens == 6 and prefill.bucket == 16
    assert prefill.chunks[0].is_last and prefill.chunks[0].row == 0
    assert prefill.edits == (PlaceRow(0, None, 7, (1, 2), request.sampling, request.seed),)
    assert request.status is RequestStatus.RUNNING and request.output_token_ids == []
    assert engine.read_back() == [request] and len(request.output_token_ids) == 1
    decode = engine.launch()
    assert (decode.kind, decode.bucket, decode.request_ids, decode.edits) == (StepKind.DECODE, 1, ("a",), ())
    engine.read_back()
    assert engine.launch().kind is StepKind.DECODE
    assert request.status is RequestStatus.DRAINING, "its last step is launched"
    assert not engine.scheduler.schedule(), "nothing is left to launch"
    assert engine.read_back() == [request]
    assert request.finish_reason is FinishReason.LENGTH and request.finished
    assert request.output_token_ids == engine.expected["a"].reference.tokens[6:]
    assert request.cumulative_logprob == 3 * LOGPROB
    assert engine.scheduler.num_unfinished == 0 and engine.scheduler.block_manager.num_used_blocks == 0


def test_metadata_is_what_the_user_may_see_of_a_sequence() -> None:
    engine = Engine()
    engine.add("a", prompt_of(6), 3)
    waiting = engine.scheduler.metadata("a")
    assert (waiting.row, waiting.num_tokens, waiting.num_computed_tokens, waiting.block_table) == (NO_ROW, 6, 0, [])
    engine.launch()
    running = engine.scheduler.metadata("a")
    assert (running.request_id, running.row, running.num_tokens, running.num_computed_tokens) == ("a", 0, 7, 6)
    assert running.block_table == [1, 2]
    with pytest.raises(InvalidRequestError, match="no unfinished request 'b'"):
        engine.scheduler.metadata("b")


def test_every_step_says_why() -> None:
    engine = Engine(decode_buckets=BucketTable([4], 4))
    engine.add("a", prompt_of(6), 2)
    engine.add("b", prompt_of(3, first=2), 2)
    assert engine.step().reason == "9 prompt tokens of 2 requests in bucket 16"
    assert engine.step().reason == "2 rows decode in bucket 4"


# Requests that are refused


def test_a_prompt_that_leaves_no_room_is_refused_with_value_and_bound() -> None:
    engine = Engine(max_model_len=32)
    with pytest.raises(
        InvalidRequestError, match=r"the prompt has 32 tokens, but max_model_len=32 allows at most 31.*shorten"
    ):
        engine.add("a", prompt_of(32), 1)
    assert engine.scheduler.num_unfinished == 0 and engine.scheduler.num_waiting == 0


def test_the_longest_prompt_gets_its_one_token() -> None:
    engine = Engine(max_model_len=32, num_gpu_blocks=8)
    request = engine.add("a", prompt_of(31), 100)
    assert request.max_output_tokens == 1
    engine.finish()
    assert request.finish_reason is FinishReason.LENGTH and len(request.output_token_ids) == 1


def test_empty_prompts_and_ids_in_use_are_refused() -> None:
    engine = Engine()
    with pytest.raises(InvalidRequestError, match="the prompt is empty: at least 1 token"):
        engine.add("a", [], 1)
    engine.add("a", [1], 1)
    with pytest.raises(InvalidRequestError, match="request id 'a' is in use"):
        engine.add("a", [2], 1)
    engine.finish()
    engine.add("a", [3], 1)
    engine.finish()


# Configurations that are refused


def test_a_pool_that_cannot_hold_one_sequence_says_the_ways_out() -> None:
    with pytest.raises(OutOfMemoryError) as error:
        Scheduler(4, 100, 16, num_gpu_blocks=6)
    message = str(error.value)
    assert "6 KV cache blocks of 16 tokens" in message and "takes 7" in message
    assert "lower max_model_len to at most 96" in message
    assert "gpu_memory_utilization" in message and "num_gpu_blocks" in message
    Scheduler(4, 100, 16, num_gpu_blocks=7)
    Scheduler(4, 96, 16, num_gpu_blocks=6)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "block_size", "max_prefill_seqs"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        Scheduler(**{"max_num_seqs": 4, "max_model_len": 32, "block_size": 4, name: 0})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prefill_share", 0, r"prefill_share must be in \(0, 1\], got 0"),
        ("prefill_share", 1.1, r"prefill_share must be in \(0, 1\], got 1.1"),
        ("prefill_share", NAN, r"prefill_share must be in \(0, 1\], got nan"),
        ("preemption", "Swap", "preemption must be one of auto, swap, recompute, got 'Swap'"),
        ("num_cpu_blocks", -1, "num_cpu_blocks must be at least 0, got -1"),
        ("context_ms_per_token", -1e-9, "context_ms_per_token must be finite and at least 0, got -1e-09"),
        ("context_ms_per_token", NAN, "context_ms_per_token must be finite and at least 0, got nan"),
        ("attention_window", -1, "attention_window must be at least 0, got -1"),
    ],
)
def test_options_out_of_bounds_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheduler(4, 32, 4, **{name: value})


def test_buckets_must_reach_the_largest_batch() -> None:
    with pytest.raises(ConfigError, match="decode buckets end at 8 but max_num_seqs is 9"):
        Scheduler(9, 32, 4, decode_buckets=BucketTable([4], 8))


# Prefill


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


# Prefill and decode share the time


def run_under_stream(share: float, prefill_ms: float, decode_ms: float, num_steps: int) -> tuple[float, float]:
    """Prefill and decode milliseconds while rows decode and prompts keep waiting."""
    engine = Engine(
        max_num_seqs=4,
        max_model_len=64,
        prefill_share=share,
        decode_buckets=BucketTable([], 4, {4: decode_ms}),
        prefill_buckets=BucketTable([], 8, {8: prefill_ms}),
        enable_prefix_caching=False,
    )
    numbers = itertools.count()
    engine.add("first", [1], 60)
    engine.step()
    spent = {StepKind.PREFILL: 0.0, StepKind.DECODE: 0.0}
    for _ in range(num_steps):
        while engine.scheduler.num_waiting < 3:
            engine.add(f"r{next(numbers)}", prompt_of(8), 3)
        if engine.scheduler.num_running == 0:
            break
        had_rows = engine.scheduler.num_running
        outputs = engine.step()
        assert outputs
        if had_rows:
            spent[outputs.kind] += prefill_ms if outputs.kind is StepKind.PREFILL else decode_ms
    return spent[StepKind.PREFILL], spent[StepKind.DECODE]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(("prefill_ms", "decode_ms"), [(5.0, 1.0), (1.0, 1.0)])
def test_prefill_takes_no_more_than_its_share(share: float, prefill_ms: float, decode_ms: float) -> None:
    """At most one prefill step over its share and half a decode step's, to which it is rounded; decode goes on."""
    prefill, decode = run_under_stream(share, prefill_ms, decode_ms, 100)
    assert decode > 0
    assert prefill * (1 - share) <= decode * share + prefill_ms * (1 - share) + decode_ms * share / 2 + 1e-6
    assert prefill > 0


def test_a_cheap_prefill_uses_its_share() -> None:
    """The share is there to be used: with work for both, prefill gets about half of the time at 0.5."""
    engine = Engine(
        max_num_seqs=8,
        max_model_len=256,
        prefill_share=0.5,
        decode_buckets=BucketTable([], 8, {8: 1.0}),
        prefill_buckets=BucketTable([], 4, {4: 1.0}),
    )
    engine.add("a", [1], 200)
    engine.step()
    engine.add("b", prompt_of(200, first=2), 10)
    kinds = [engine.step().kind for _ in range(40)]
    assert 18 <= kinds.count(StepKind.PREFILL) <= 22
    assert all(StepKind.DECODE in pair for pair in itertools.pairwise(kinds))


def decode_steps_between(*, decode_ms: float, context_ms_per_token: float = 0.0) -> list[int]:
    """Decode steps from each of 64 prefill steps, of 16 ms, to the next; one prompt each, and some output."""
    engine = Engine(
        max_num_seqs=64,
        max_model_len=64,
        decode_buckets=BucketTable([], 64, {64: decode_ms}),
        prefill_buckets=BucketTable([], 32, {32: 16.0}),
        context_ms_per_token=context_ms_per_token,
        enable_prefix_caching=False,
    )
    for number in range(64):
        engine.add(f"r{number}", [number] * 32, 16)
    between: list[int] = []
    for outputs in engine.finish():
        if outputs.kind is StepKind.PREFILL:
            between.append(0)
        else:
            between[-1] += 1
    return between


def test_one_decode_step_after_each_prefill_step_where_decode_is_dear() -> None:
    """By default decode gets 0.48 ms of time for 16 of prefill: half a step or less. It gets one, and no more.

    The first prompt finds nobody decoding, so the second follows at once.
    """
    between = decode_steps_between(decode_ms=2.0)
    assert len(between) == 64 and between[:-1] == [0] + [1] * 62


def test_several_decode_steps_after_each_prefill_step_where_decode_is_cheap() -> None:
    """0.48 ms are five steps of 0.1 ms; at least, since the share is one of time."""
    between = decode_steps_between(decode_ms=0.1)
    assert len(between) == 64 and between[:-1] == [0] + [5] * 62


def test_contexts_make_decode_dear() -> None:
    """The same steps without contexts would be five."""
    between = decode_steps_between(decode_ms=0.1, context_ms_per_token=0.02)
    assert len(between) == 64 and between[:-1] == [0] + [1] * 62


def test_share_one_lets_prompts_go_first() -> None:
    engine = Engine(prefill_share=1.0, max_num_seqs=8, prefill_buckets=BucketTable([], 4))
    engine.add("a", [1], 20)
    engine.step()
    engine.add("b", prompt_of(16, first=2), 2)
    assert [engine.step().kind for _ in range(5)] == [StepKind.PREFILL] * 4 + [StepKind.DECODE]


def test_first_come_first_served() -> None:
    """Under a stream of short prompts, an early long one is not overtaken, though they would fit and it does not."""
    engine = Engine(max_num_seqs=3, max_model_len=32, num_gpu_blocks=8, enable_prefix_caching=False)
    engine.add("r0", [0], 12)
    engine.add("r1", [1], 12)
    engine.step()
    engine.add("long", prompt_of(28, first=7), 2)
    numbers = itertools.count(2)
    order: dict[str, None] = {}
    for _ in range(60):
        if engine.scheduler.num_waiting < 3:
            number = next(numbers)
            engine.add(f"r{number}", [number], 6)
        order.update({chunk.request_id: None for chunk in engine.step().chunks if chunk.is_last})
    assert list(order)[:5] == ["long", "r2", "r3", "r4", "r5"]


def test_a_lead_of_prefill_is_forgotten_when_nobody_decodes() -> None:
    """A prompt that comes after a pause does not wait for decode steps that an earlier one owed."""
    engine = Engine(
        prefill_share=0.2,
        max_num_seqs=8,
        decode_buckets=BucketTable([], 8, {8: 1.0}),
        prefill_buckets=BucketTable([], 8, {8: 1000.0}),
    )
    engine.add("a", [1], 3)
    engine.step()
    engine.add("b", [2], 1)
    engine.finish()
    assert not engine.scheduler.schedule()
    engine.add("c", [3], 9)
    engine.step()
    engine.add("d", [4], 2)
    assert engine.step().kind is StepKind.PREFILL


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


def blocks_of(engine: Engine, name: str) -> int:
    return len(engine.scheduler.metadata(name).block_table)


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


# Ends from outside, and failures


def test_nan_ends_only_its_own_request() -> None:
    engine = Engine()
    a = engine.add("a", [1], 6, nan_at=2)
    b = engine.add("b", [2], 6)
    engine.finish()
    assert a.finish_reason is FinishReason.ERROR and "not finite" in str(a.error)
    assert len(a.output_token_ids) == 2 and a.cumulative_logprob == 2 * LOGPROB
    assert b.finish_reason is FinishReason.LENGTH and b.error is None


@pytest.mark.parametrize("steps", range(5), ids=["waiting", "prefilling", "prefilling more", "running", "running more"])
def test_abort_in_every_state(steps: int) -> None:
    engine = Engine(prefill_buckets=BucketTable([], 4))
    request = engine.add("a", prompt_of(11), 9)
    for _ in range(steps):
        engine.launch()
    assert engine.scheduler.finish("a", FinishReason.ABORT) is request
    assert request.finish_reason is FinishReason.ABORT and request.error is None
    assert engine.scheduler.finish("a", FinishReason.ABORT) is None
    for _ in range(steps):
        assert engine.read_back() == []
    assert engine.scheduler.block_manager.num_used_blocks == 0 and not engine.scheduler.schedule()


def test_abort_while_swapped_and_while_draining() -> None:
    engine = Engine(max_model_len=8, block_size=1, num_gpu_blocks=8, num_cpu_blocks=8, preemption="swap")
    engine.add("a", [1, 2], 6)
    b = engine.add("b", [3, 4], 6)
    while b.status is not RequestStatus.SWAPPED:
        engine.step()
    engine.scheduler.finish("b", FinishReason.ABORT)
    assert engine.scheduler.block_manager.num_free_cpu_blocks == 8
    a = engine.requests["a"]
    while a.status is not RequestStatus.DRAINING:
        engine.launch()
    engine.scheduler.finish("a", FinishReason.ABORT)
    while engine.launched:
        assert engine.read_back() == []
    assert engine.scheduler.block_manager.num_used_blocks == 0


def test_a_failed_step_ends_its_requests_and_no_others() -> None:
    engine = Engine()
    a = engine.add("a", [1], 6)
    engine.step()
    b = engine.add("b", [2], 6)
    outputs = engine.scheduler.schedule()
    assert outputs.request_ids == ("b",)
    engine.device.lose(outputs)
    assert engine.scheduler.fail(outputs, "it broke") == [b]
    assert (b.finish_reason, b.error) == (FinishReason.ERROR, "it broke")
    engine.finish()
    assert a.finish_reason is FinishReason.LENGTH
    assert engine.scheduler.fail(outputs, "again") == []


def test_what_a_failed_prefill_left_is_never_a_hit() -> None:
    engine = Engine()
    engine.add("a", prompt_of(12), 2)
    outputs = engine.scheduler.schedule()
    engine.device.lose(outputs)
    engine.scheduler.fail(outputs, "it broke")
    b = engine.add("b", prompt_of(12), 2)
    engine.finish()
    assert b.num_cached_tokens == 0


def test_chunk_of_a_former_life_is_not_cached() -> None:
    """P is preempted with a chunk in flight and comes back in other blocks, whose step then fails."""
    engine = Engine(
        max_model_len=6,
        block_size=1,
        num_gpu_blocks=6,
        prefill_buckets=BucketTable([], 2, {2: 1.0}),
        preemption="recompute",
    )
    engine.add("a", [1], 5)
    engine.step()
    engine.add("q", [2], 5)
    p = engine.add("p", [3, 4, 5], 1)
    assert engine.launch().request_ids == ("q", "p")
    assert engine.launch().request_ids == ("a", "q") and p.num_preemptions == 1
    engine.scheduler.finish("a", FinishReason.ABORT)
    engine.scheduler.finish("q", FinishReason.ABORT)
    outputs = engine.scheduler.schedule()
    if outputs:
        engine.device.lose(outputs)
    engine.read_back()
    engine.read_back()
    if outputs:
        engine.scheduler.fail(outputs, "it broke")
    engine.add("z", [3, 4, 5], 1)
    engine.finish()


# Preemption


def tight(**options: Any) -> Engine:
    """Two sequences that cannot both be held at their full length of 8 blocks."""
    engine = Engine(
        **{"max_num_seqs": 4, "max_model_len": 8, "block_size": 1, "num_gpu_blocks": 10, "num_cpu_blocks": 8, **options}
    )
    engine.add("a", [1, 2], 6)
    engine.add("b", [3, 4], 6)
    return engine


@pytest.mark.parametrize(
    ("options", "costs", "kind"),  # costs: milliseconds to swap a block, and of a prefill step
    [
        ({"preemption": "swap"}, None, "swap"),
        ({"preemption": "swap"}, (1000.0, 0.1), "swap"),
        ({"preemption": "recompute"}, None, "recompute"),
        ({"preemption": "recompute"}, (0.001, 1000.0), "recompute"),
        ({"preemption": "auto"}, None, "swap"),
        ({"preemption": "auto"}, (0.1, 5.0), "swap"),
        ({"preemption": "auto"}, (0.45, 5.0), "swap"),  # 5 blocks out and in: 4.5 ms
        ({"preemption": "auto"}, (0.55, 5.0), "recompute"),  # 5.5 ms
        ({"preemption": "auto", "num_cpu_blocks": 0}, None, "recompute"),
        ({"preemption": "swap", "num_cpu_blocks": 0}, None, "recompute"),
        ({"preemption": "swap", "num_cpu_blocks": 4}, None, "recompute"),
        ({"preemption": "swap", "num_cpu_blocks": 5}, None, "swap"),
    ],
    ids=str,
)
def test_swap_or_recompute(options: dict[str, Any], costs: tuple[float, float] | None, kind: str) -> None:
    """By what was asked, else by cost (two copies of the blocks against a prefill); recompute where CPU blocks end."""
    if costs is not None:
        swap, prefill = costs
        options = {**options, "swap_ms_per_block": swap, "prefill_buckets": BucketTable([], 8, {8: prefill})}
    engine = tight(**options)
    engine.finish()
    counts = engine.scheduler.num_preemptions
    assert counts[kind] >= 1 and sum(counts.values()) == counts[kind]


def test_the_latest_arrival_loses_its_place_and_the_other_goes_on() -> None:
    engine = tight(preemption="swap")
    a, b = engine.requests.values()
    while not b.num_preemptions:
        engine.step()
    assert b.status is RequestStatus.SWAPPED and b.row == NO_ROW and engine.scheduler.num_waiting == 1
    assert a.status is RequestStatus.RUNNING
    c = engine.add("c", [5], 1)
    while not b.finished:
        assert c.status is RequestStatus.WAITING or b.status is not RequestStatus.SWAPPED, "c overtook b"
        engine.step()
    engine.finish()
    assert a.num_preemptions == 0


def test_a_swapped_sequence_comes_back_in_one_step_with_its_token() -> None:
    engine = tight(preemption="swap")
    b = engine.requests["b"]
    out: tuple[tuple[int, int], ...] = ()
    while not out:
        out = engine.step().swap_out
    assert len(out) == engine.scheduler.metadata("b").num_computed_tokens
    outputs = engine.step()
    while not outputs.swap_in:
        outputs = engine.step()
    assert [cpu for _, cpu in outputs.swap_in] == [cpu for _, cpu in out]
    placed = [edit for edit in outputs.edits if isinstance(edit, PlaceRow)]
    assert len(placed) == 1 and placed[0].token_id == b.output_token_ids[-2], "the token whose K/V comes next"
    assert outputs.kind is StepKind.DECODE and "b" in outputs.request_ids
    engine.finish()


def test_recompute_prefills_what_was_generated_and_goes_on() -> None:
    engine = tight(preemption="recompute", enable_prefix_caching=False)
    b = engine.requests["b"]
    while not b.num_preemptions:
        engine.step()
    generated = len(b.output_token_ids)
    assert generated >= 1
    steps = engine.finish()
    again = [chunk for step in steps for chunk in step.chunks if chunk.request_id == "b"]
    assert again[0].start == 0 and list(again[0].token_ids[:2]) == [3, 4]
    assert again[-1].is_last and again[-1].stop >= 2 + generated
    assert len(b.output_token_ids) == 6


def test_what_it_finds_of_itself_after_a_preemption_is_no_cached_prompt() -> None:
    """`num_cached_tokens` says what a request got for free, not what it got back."""
    engine = tight(preemption="recompute")
    b = engine.requests["b"]
    steps = engine.finish()
    again = [chunk for step in steps for chunk in step.chunks if chunk.request_id == "b"][1:]
    assert again[0].start > b.num_prompt_tokens, "its own blocks were still there, those of its outputs, too"
    assert b.num_cached_tokens == 0


def test_a_half_computed_prompt_is_begun_again_not_swapped() -> None:
    engine = Engine(
        max_model_len=12,
        block_size=1,
        num_gpu_blocks=12,
        num_cpu_blocks=100,
        preemption="swap",
        prefill_share=0.2,
        prefill_buckets=BucketTable([], 1, {1: 100.0}),
    )
    engine.add("a", [1], 11)
    engine.step()
    b = engine.add("b", prompt_of(8, first=2), 2)
    while not b.num_preemptions:
        assert engine.step()
    assert engine.scheduler.num_preemptions == {"swap": 0, "recompute": 1}
    assert b.status is RequestStatus.WAITING and engine.scheduler.num_prefilling == 0
    engine.finish()


def test_a_prefill_goes_on_when_the_last_row_was_preempted() -> None:
    """Prefill is ahead of its share, so decode is first; that preempts the only row, but an older prompt can go on."""
    engine = Engine(
        max_model_len=20,
        block_size=1,
        num_gpu_blocks=20,
        num_cpu_blocks=9,
        prefill_share=0.2,
        preemption="swap",
        prefill_buckets=BucketTable([], 3, {3: 100.0}),
        enable_prefix_caching=False,
    )
    for name, max_tokens in (("a", 12), ("b", 19), ("c", 19)):
        engine.add(name, [ord(name)], max_tokens)
    saw_it = False
    while engine.scheduler.num_unfinished:
        rows = engine.scheduler.num_running
        outputs = engine.step()
        assert outputs, "idle, with requests to serve and no step to wait for"
        saw_it |= bool(rows and outputs.swap_out and outputs.kind is StepKind.PREFILL)
    assert saw_it, "the case did not come up"


def test_the_smallest_pool_serves_everybody_in_the_end() -> None:
    """Blocks for one sequence, ten requests of full length."""
    for options in ({"preemption": "swap", "num_cpu_blocks": 100}, {"preemption": "recompute"}):
        engine = Engine(max_model_len=8, block_size=2, num_gpu_blocks=4, **options)
        for number in range(10):
            engine.add(f"r{number}", [number, 1, 2], 5)
        engine.finish()
        assert all(len(request.output_token_ids) == 5 for request in engine.requests.values())


def test_logprobs_of_incomplete_chunks_mean_nothing() -> None:
    """The runner has no logits for them; whatever it returns must not end the request."""
    engine = Engine(prefill_buckets=BucketTable([], 4))
    request = engine.add("a", prompt_of(6), 1)
    outputs = engine.scheduler.schedule()
    assert not outputs.chunks[0].is_last
    assert engine.scheduler.update(outputs, sampled_tokens([-1], [NAN])) == []
    assert request.finish_reason is None and request.output_token_ids == []


def test_results_of_the_wrong_length_are_noticed() -> None:
    engine = Engine()
    engine.add("a", [1], 2)
    outputs = engine.scheduler.schedule()
    with pytest.raises(ValueError):
        engine.scheduler.update(outputs, sampled_tokens([1, 2], [0.0, 0.0]))


@pytest.mark.parametrize(("window", "contexts"), [(0, (16 + 18, 12)), (8, (14 + 15, 8))])
def test_decode_steps_are_predicted_with_their_contexts(window: int, contexts: tuple[int, int]) -> None:
    """Two rows of 6 and 10 tokens, then 7 and 11; then the second alone, in the first one's row, with 12."""
    engine = Engine(
        decode_buckets=BucketTable([1, 2], 4, {1: 1.0, 2: 1.5, 4: 2.0}),
        prefill_buckets=BucketTable([], 16, {16: 5.0}),
        context_ms_per_token=0.01,
        attention_window=window,
    )
    engine.add("a", prompt_of(5), 3)
    engine.add("b", prompt_of(9, first=3), 4)
    engine.finish()
    uses = engine.scheduler.decode_padding.by_bucket
    assert {bucket: use.steps for bucket, use in uses.items()} == {1: 1, 2: 2}
    assert uses[2].predicted_ms == pytest.approx(2 * 1.5 + 0.01 * contexts[0])
    assert uses[1].predicted_ms == pytest.approx(1.0 + 0.01 * contexts[1])
    assert uses[1].padding_ms == uses[2].padding_ms == 0.0, "contexts are no padding"
    assert engine.scheduler.prefill_padding.by_bucket[16].predicted_ms == 5.0


def test_padding_is_counted() -> None:
    engine = Engine(decode_buckets=BucketTable([], 4, {4: 2.0}))
    engine.add("a", prompt_of(6), 3)
    engine.finish()
    use = engine.scheduler.decode_padding.by_bucket[4]
    assert (use.steps, use.rows, use.padded, use.padding_ms) == (2, 2, 6, 3.0)
    assert engine.scheduler.prefill_padding.by_bucket[16].padded == 10
