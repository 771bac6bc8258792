"""Ends from outside, steps that fail, and results that mean nothing."""

from __future__ import annotations

import pytest

from mini_infer.buckets import BucketTable
from mini_infer.request import FinishReason, RequestStatus
from tests.scheduler.driving import Engine, prompt_of
from tests.simulated_device import LOGPROB, NAN, sampled_tokens


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
