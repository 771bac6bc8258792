"""The scheduler as its users meet it: the contract, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mini_infer.buckets import BucketTable
from mini_infer.exceptions import ConfigError, InvalidRequestError, OutOfMemoryError
from mini_infer.request import FinishReason, Request, RequestStatus
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from mini_infer.step import PlaceRow, SchedulerOutputs, StepKind
from mini_infer.typing import NO_ROW
from tests.scheduler.driving import Engine, prompt_of
from tests.simulated_device import LOGPROB, NAN

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
