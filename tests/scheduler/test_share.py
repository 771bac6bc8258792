"""How prefill and decode share the time, and what steps are predicted to take of it."""

from __future__ import annotations

import itertools

import pytest

from mini_infer.buckets import BucketTable
from mini_infer.step import StepKind
from tests.scheduler.driving import Engine, prompt_of


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
