"""Who loses its place, what becomes of its blocks, and how it comes back."""

from __future__ import annotations

from typing import Any

import pytest

from mini_infer.buckets import BucketTable
from mini_infer.request import RequestStatus
from mini_infer.step import PlaceRow, StepKind
from mini_infer.typing import NO_ROW
from tests.scheduler.driving import Engine, prompt_of


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
