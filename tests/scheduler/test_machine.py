"""The scheduler against a simulated device, under random loads, random configurations and random failures.

Whatever happens on the way (preemption, swap, prefix hits, chunks, steps in flight, aborts, failed steps), every
request ends, and with the tokens that it would have got alone.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pytest import approx

from mini_infer.buckets import BucketTable
from mini_infer.output_table import NO_SLOT, NOBODY
from mini_infer.request import FinishReason, Request, RequestStatus
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Scheduler
from mini_infer.step import SampledTokens, SchedulerOutputs, StepKind
from mini_infer.typing import NO_ROW, NULL_BLOCK
from tests.hypothesis_profiles import STATE_MACHINE
from tests.simulated_device import Expected, Reference, SimulatedDevice

ON_DEVICE = (RequestStatus.PREFILLING, RequestStatus.RUNNING, RequestStatus.DRAINING)
SEATED = (RequestStatus.PREFILLING, RequestStatus.RUNNING)
STEMS = ((0, 0, 1, 0, 1, 1) * 4, (0, 0, 1, 1, 1, 0) * 4)  # prompts begin alike, up to the third or the last token
Ask: TypeAlias = tuple[tuple[int, ...], int, frozenset[int], int | None]
PENALTY = 0.5  # of every other request
PROMPTS = st.builds(
    lambda stem, length, last: (*stem[: length - 1], last),
    st.sampled_from(STEMS),
    st.sampled_from([3, 2, 1, 5, 3, 2, 13, 19]),
    st.integers(0, 2),
)
ASKS = st.tuples(
    PROMPTS,
    st.sampled_from([20, 14, 20, 8, 3, 1]),  # max_tokens
    st.sampled_from([frozenset[int]()] * 3 + [frozenset({3})]),  # stop tokens
    st.sampled_from([None] * 10 + [0, 2]),  # the output whose logits are NaN
)

COSTS = st.sampled_from([0.1, 1.0, 1.5, 4.0, 30.0])


@st.composite
def bucket_tables(draw: st.DrawFn, largest: int) -> BucketTable:
    """A few sizes, odd ones too, at costs that need not even rise."""
    sizes = draw(st.sets(st.integers(1, largest), max_size=4))
    if draw(st.booleans()):
        return BucketTable(sizes, largest)
    return BucketTable(sizes, largest, {size: draw(COSTS) for size in sorted(sizes | {largest})})


@dataclass(frozen=True)
class Setup:
    """Arguments of a `Scheduler`; how many steps are in flight; whether requests are aborted and steps fail.

    Half of the runs are free of trouble: it empties the engine, and so keeps it from running short of blocks.
    """

    options: dict[str, Any]
    steps_in_flight: int
    troubled: bool


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """A scheduler whose memory is tight."""
    block_size = draw(st.sampled_from([2, 1, 3, 4]))
    max_model_len = draw(st.sampled_from([12, 20, 7, 3, 2]))
    max_num_seqs = draw(st.sampled_from([4, 6, 3, 2, 1]))
    blocks_per_seq = -(-max_model_len // block_size)
    options = {
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
        "block_size": block_size,
        "num_gpu_blocks": blocks_per_seq + draw(st.sampled_from([0, 1, 2, blocks_per_seq])),
        "num_cpu_blocks": draw(st.sampled_from([0, 100, 5, 2])),
        "decode_buckets": draw(bucket_tables(max_num_seqs)),
        "prefill_buckets": draw(bucket_tables(draw(st.sampled_from([24, 8, 5, 3, 1])))),
        "max_prefill_seqs": draw(st.sampled_from([4, 2, 1])),
        "prefill_share": draw(st.sampled_from([0.2, 0.5, 0.97, 1.0])),
        "preemption": draw(st.sampled_from(["swap", "recompute", "auto"])),
        "swap_ms_per_block": draw(st.one_of(st.none(), COSTS)),
        "enable_prefix_caching": draw(st.booleans()),
        "context_ms_per_token": draw(st.sampled_from([0.0, 0.1, 3.0])),
        "attention_window": draw(st.sampled_from([0, 4])),
    }
    return Setup(options, draw(st.sampled_from([1, 2, 3])), troubled=draw(st.booleans()))


@dataclass
class InFlight:
    """A step that was launched; ``sampled`` None: it will fail when it is read back."""

    outputs: SchedulerOutputs
    sampled: SampledTokens | None


class SchedulerMachine(RuleBasedStateMachine):
    """The engine's loop around a scheduler, with a simulated device for its runner."""

    @initialize(setup=setups(), asks=st.lists(ASKS, min_size=3, max_size=8))
    def start(self, setup: Setup, asks: list[Ask]) -> None:
        self.options, self.steps_in_flight, self.troubled = setup.options, setup.steps_in_flight, setup.troubled
        self.scheduler = Scheduler(**self.options)
        self.manager = self.scheduler.block_manager
        self.expected: dict[str, Expected] = {}
        self.device = SimulatedDevice(
            self.expected,
            **{name: self.options[name] for name in ("max_num_seqs", "block_size", "num_gpu_blocks", "num_cpu_blocks")},
        )
        self.in_flight: deque[InFlight] = deque()
        self.requests: list[Request] = []
        self.unfinished: dict[str, Request] = {}
        self.first_token_launched: set[str] = set()
        self.num_steps = 0
        self.owes_step = False  # a prefill step took its time from rows that decode, which had no step since
        self.add(asks)

    # What happens to the engine

    @rule(asks=st.lists(ASKS, min_size=1, max_size=6))
    def add_some(self, asks: list[Ask]) -> None:
        self.add(asks)

    def add(self, asks: list[Ask]) -> None:
        for prompt, max_tokens, stop, nan_at in asks:
            if len(self.unfinished) < 12:
                self.add_request(prompt[: self.options["max_model_len"] - 1], max_tokens, stop, nan_at)

    def add_request(
        self, prompt: tuple[int, ...], max_tokens: int, stop: frozenset[int] = frozenset(), nan_at: int | None = None
    ) -> Request:
        number = len(self.requests)
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=max_tokens, presence_penalty=PENALTY * (number % 2)),
            seed=number,
            stop_token_ids=stop,
        )
        reference = Reference(prompt, min(max_tokens, self.options["max_model_len"] - len(prompt)))
        self.expected[request.request_id] = Expected(reference, request.sampling, request.seed, nan_at)
        self.scheduler.add(request)
        self.requests.append(request)
        self.unfinished[request.request_id] = request
        return request

    @rule(count=st.sampled_from([3, 1, 6, 12]))
    def engine_steps(self, count: int) -> None:
        """As the engine does it: launch one, read one back when enough are in flight."""
        for _ in range(count):
            self.engine_step()

    def engine_step(self) -> None:
        self.launch()
        if self.in_flight and (self.last_was_idle or len(self.in_flight) >= self.steps_in_flight):
            self.read_back()

    @rule()
    def launch_only(self) -> None:
        if len(self.in_flight) >= self.steps_in_flight:
            self.read_back()
        self.launch()

    @rule()
    def read_back_only(self) -> None:
        if self.in_flight:
            self.read_back()

    @precondition(lambda self: self.troubled)
    @rule(index=st.integers(0, 11))
    def abort(self, index: int) -> None:
        if index >= len(self.unfinished):
            return
        request = list(self.unfinished.values())[index]
        assert self.scheduler.finish(request.request_id, FinishReason.ABORT) is request
        self.check_end(request, FinishReason.ABORT)

    @precondition(lambda self: self.troubled)
    @rule()
    def fail_at_launch(self) -> None:
        """The step cannot be launched; copies and edits were made."""
        if len(self.in_flight) >= self.steps_in_flight:
            self.read_back()
        outputs = self.schedule()
        if outputs:
            self.device.lose(outputs)
            self.fail(outputs)

    @precondition(lambda self: self.troubled)
    @rule(ran=st.booleans())
    def launch_one_that_fails(self, ran: bool) -> None:
        """The step is launched, and its failure noticed when it is read back."""
        if len(self.in_flight) >= self.steps_in_flight:
            self.read_back()
        outputs = self.schedule()
        if outputs:
            if ran:
                self.device.run(outputs)
            else:
                self.device.lose(outputs)
            self.in_flight.append(InFlight(outputs, None))

    @precondition(lambda self: self.troubled)
    @rule(scheduled=st.booleans(), index=st.integers(0, 40))
    def fail_all(self, scheduled: bool, index: int) -> None:
        """A step's copies and edits are lost, but for the first few."""
        if len(self.in_flight) >= self.steps_in_flight:
            self.read_back()
        if scheduled and (outputs := self.schedule()):
            self.device.prepare(replace(outputs, edits=outputs.edits[:index], swap_in=(), swap_out=()))
        counts = self.scheduler.num_preemptions
        fresh = {request for request in self.unfinished.values() if request.slot == NO_SLOT}
        ended = self.scheduler.fail_all("it broke")
        self.manager = self.scheduler.block_manager
        self.device.lost.update(request.request_id for request in ended)
        self.owes_step = False
        for request in ended:
            assert request.error == "it broke"
            self.check_end(request, FinishReason.ERROR)
        assert {*self.unfinished.values()} == fresh, "not those who were never admitted go on"
        assert self.manager.num_used_blocks == self.manager.num_cached_blocks == 0
        assert self.scheduler.num_preemptions == counts

    # The engine's loop

    def schedule(self) -> SchedulerOutputs:
        seated = {request: request.num_preemptions for request in self.unfinished.values() if request.status in SEATED}
        decoding = [request for request in seated if request.status is RequestStatus.RUNNING]
        outputs = self.scheduler.schedule()
        self.check_turns(outputs, any(request.num_preemptions == seated[request] for request in decoding))
        kept = [request.arrival for request, before in seated.items() if request.num_preemptions == before]
        for request, before in seated.items():
            if request.num_preemptions > before:
                assert request.arrival > max(kept, default=-1), "an earlier arrival lost its place to a later one"
                self.check_nothing_ahead()
        assert outputs.reason, "a step without a reason"
        self.last_was_idle = not outputs
        if not outputs:
            assert outputs.kind is StepKind.IDLE
            assert self.in_flight or not self.unfinished, "idle, with requests to serve and no step to wait for"
            return outputs
        self.num_steps += 1
        assert outputs.step == self.num_steps
        self.check_bucket(outputs)
        self.check_order(outputs)
        return outputs

    def launch(self) -> None:
        before = self.predicted_ms(StepKind.PREFILL), self.predicted_ms(StepKind.DECODE)
        outputs = self.schedule()
        if outputs:
            self.in_flight.append(InFlight(outputs, self.device.run(outputs)))
            self.check_prediction(outputs, *before)
            if outputs.kind is StepKind.DECODE:
                self.check_tables(outputs)

    def read_back(self) -> None:
        step = self.in_flight.popleft()
        if step.sampled is None:
            self.fail(step.outputs)
            return
        waiting = [request_id for request_id in step.outputs.request_ids if request_id in self.unfinished]
        if step.outputs.kind is StepKind.PREFILL:
            complete = {chunk.request_id for chunk in step.outputs.chunks if chunk.is_last}
            waiting = [request_id for request_id in waiting if request_id in complete]
        before = {request: len(request.output_token_ids) for request in self.unfinished.values()}
        changed = self.scheduler.update(step.outputs, step.sampled)
        assert len(set(changed)) == len(changed)
        for request, count in before.items():
            added = len(request.output_token_ids) - count
            due = request.request_id in waiting
            assert added == (due and request.error is None), "not exactly those of the step got its token"
            assert (request in changed) == (request.finished or (due and count == 0)), "not those were told of it"
            if request.finished:
                assert due
                self.check_end(request, None)

    def fail(self, outputs: SchedulerOutputs) -> None:
        hit = {request_id for request_id in outputs.request_ids if request_id in self.unfinished}
        ended = self.scheduler.fail(outputs, "it broke")
        assert {request.request_id for request in ended} == hit
        for request in ended:
            assert request.error == "it broke"
            self.check_end(request, FinishReason.ERROR)

    # What must hold

    def check_nothing_ahead(self) -> None:
        """Somebody lost its place: nobody else has a block that it does not need."""
        for request in self.unfinished.values():
            if request.status is RequestStatus.RUNNING:
                metadata = self.scheduler.metadata(request.request_id)
                assert len(metadata.block_table) <= self.manager.blocks_for(metadata.num_tokens)

    def check_bucket(self, outputs: SchedulerOutputs) -> None:
        decode = outputs.kind is StepKind.DECODE
        table = self.options["decode_buckets" if decode else "prefill_buckets"]
        size = outputs.num_seqs if decode else outputs.num_tokens
        covering = [bucket for bucket in table.sizes if bucket >= size]
        assert outputs.bucket in covering
        assert table.costs[outputs.bucket] == min(table.costs[bucket] for bucket in covering)
        assert outputs.num_seqs <= self.options["max_num_seqs"]
        if not decode:
            assert outputs.num_seqs <= self.options["max_prefill_seqs"]

    def check_turns(self, outputs: SchedulerOutputs, had_rows: bool) -> None:
        """No two prefill steps in a row while somebody decodes; ``had_rows``: somebody did, and kept its place."""
        if outputs.kind is StepKind.PREFILL:
            assert not (had_rows and self.owes_step), "rows wait for more than one prefill step"
            self.owes_step = had_rows and self.options["prefill_share"] < 1
        elif outputs or not had_rows:
            self.owes_step = False

    def predicted_ms(self, kind: StepKind) -> float:
        counter = self.scheduler.decode_padding if kind is StepKind.DECODE else self.scheduler.prefill_padding
        return sum(use.predicted_ms for use in counter.by_bucket.values())

    def check_prediction(self, outputs: SchedulerOutputs, prefill_ms: float, decode_ms: float) -> None:
        """By the bucket's cost, and by the rows' lengths in a decode step, which has made them one longer by now."""
        if outputs.kind is StepKind.PREFILL:
            prefill_ms += self.options["prefill_buckets"].costs[outputs.bucket]
        else:
            lengths = [self.scheduler.metadata(request_id).num_tokens - 1 for request_id in outputs.request_ids]
            if window := self.options["attention_window"]:
                lengths = [min(length, window) for length in lengths]
            decode_ms += self.options["decode_buckets"].costs[outputs.bucket]
            decode_ms += self.options["context_ms_per_token"] * sum(lengths)
        assert self.predicted_ms(StepKind.PREFILL) == approx(prefill_ms)
        assert self.predicted_ms(StepKind.DECODE) == approx(decode_ms)

    def check_tables(self, outputs: SchedulerOutputs) -> None:
        """Each row of a decode step read and wrote the blocks that are its request's now."""
        for request_id, row in zip(outputs.request_ids, self.device.rows, strict=False):
            num_blocks = self.manager.blocks_for(row.seq_len - 1)
            assert self.scheduler.metadata(request_id).block_table[:num_blocks] == row.table[:num_blocks]

    def check_order(self, outputs: SchedulerOutputs) -> None:
        """Nobody gets a first token in a later step than somebody who arrived after it."""
        first = [chunk.request_id for chunk in outputs.chunks if chunk.is_last]
        self.first_token_launched.update(first)
        for request_id in first:
            for request in self.unfinished.values():
                if request.arrival < self.unfinished[request_id].arrival:
                    assert request.request_id in self.first_token_launched, f"{request_id} overtook a request"

    def check_end(self, request: Request, outside: FinishReason | None) -> None:
        """A request has ended: by itself, or by ``outside``."""
        del self.unfinished[request.request_id]
        expected = self.expected[request.request_id]
        tokens, reason = expected.reference.result(request.stop_token_ids, expected.nan_at)
        assert request.finished and request.row == NO_ROW
        if outside is None:
            assert (request.output_token_ids, request.finish_reason) == (tokens, reason)
            assert (request.error is not None) == (reason is FinishReason.ERROR)
        else:
            assert request.output_token_ids == tokens[: len(request.output_token_ids)]
            assert request.finish_reason is outside
        assert request.cumulative_logprob == -0.5 * len(request.output_token_ids)
        assert 0 <= request.num_cached_tokens < request.num_prompt_tokens
        assert not self.manager.has(request.request_id)

    @invariant()
    def counts_agree(self) -> None:
        by_status = dict.fromkeys(RequestStatus, 0)
        for request in self.unfinished.values():
            by_status[request.status] += 1
        assert by_status[RequestStatus.FINISHED] == 0
        assert self.scheduler.num_unfinished == len(self.unfinished)
        assert self.scheduler.num_running == by_status[RequestStatus.RUNNING]
        assert self.scheduler.num_prefilling == by_status[RequestStatus.PREFILLING]
        assert self.scheduler.num_waiting == by_status[RequestStatus.WAITING] + by_status[RequestStatus.SWAPPED]
        assert by_status[RequestStatus.RUNNING] + by_status[RequestStatus.PREFILLING] <= self.options["max_num_seqs"]

    @invariant()
    def rows_are_dense_and_unique(self) -> None:
        rows = [self.scheduler.metadata(request_id).row for request_id in self.unfinished]
        assert sorted(row for row in rows if row != NO_ROW) == list(range(self.scheduler.num_running))
        for request in self.unfinished.values():
            assert (request.row != NO_ROW) == (request.status is RequestStatus.RUNNING)

    @invariant()
    def counters_follow_from_the_steps_in_flight(self) -> None:
        tokens, chunks = Counter[str](), Counter[str]()
        for step in self.in_flight:
            finals = {chunk.request_id: chunk.is_last for chunk in step.outputs.chunks}
            for request_id in step.outputs.request_ids:
                (tokens if finals.get(request_id, True) else chunks)[request_id] += 1
        for request in self.unfinished.values():
            assert request.num_in_flight == tokens[request.request_id]
            assert request.num_chunks_in_flight == chunks[request.request_id]
            assert request.num_known_outputs == len(request.output_token_ids)
            assert request.num_output_tokens == request.num_known_outputs + request.num_in_flight

    @invariant()
    def slots_are_accounted_for(self) -> None:
        outputs = self.scheduler._outputs
        owners = {request.slot: request.arrival for request in self.unfinished.values() if request.slot != NO_SLOT}
        assert len(set(owners.values())) == len(owners)
        assert {slot: owner for slot, owner in enumerate(outputs.owners.tolist()) if owner != NOBODY} == owners
        assert sorted([*owners, *outputs._free]) == list(range(len(outputs.owners)))
        assert outputs._stop_tokens == Counter(
            token_id for r in self.unfinished.values() if r.slot != NO_SLOT for token_id in r.stop_token_ids
        )

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        self.manager.check_integrity()
        owners: dict[int, tuple[int, int, str]] = {}  # block: its index in a table, digest of its prefix, whose
        cpu_blocks = 0
        for request in self.unfinished.values():
            metadata = self.scheduler.metadata(request.request_id)
            if request.status is RequestStatus.SWAPPED:
                cpu_blocks += self.manager.blocks_for(metadata.num_computed_tokens)
            if request.status not in ON_DEVICE:
                assert metadata.block_table == []
                assert request.status is RequestStatus.SWAPPED or metadata.num_computed_tokens == 0
                continue
            assert metadata.num_computed_tokens <= len(metadata.block_table) * self.manager.block_size
            states = self.expected[request.request_id].reference.states
            for index, block in enumerate(metadata.block_table):
                stop = (index + 1) * self.manager.block_size
                full = stop <= metadata.num_computed_tokens
                content = (index, states[stop - 1]) if full else (index, NULL_BLOCK)
                if block in owners:
                    other = owners[block][2]
                    assert full and content == owners[block][:2], f"{request.request_id} and {other} share a block"
                owners[block] = (*content, request.request_id)
        assert NULL_BLOCK not in owners
        assert self.manager.num_used_blocks == len(owners), "blocks are in use that no table names"
        assert self.manager.num_free_cpu_blocks == self.manager.num_cpu_blocks - cpu_blocks

    # The end: everything finishes, nothing leaks, and what is still cached is right

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.drain()
        length = self.options["max_model_len"] - 1
        for tokens in sorted({tuple(e.reference.tokens[:length]) for e in self.expected.values()}):
            self.add_request(tokens, 1)  # reads every cached block that a later prompt could find
        self.drain()

    def drain(self) -> None:
        limit = 20 + 8 * self.options["max_model_len"] * (len(self.unfinished) + 1)
        for _ in range(limit):
            if not self.unfinished and not self.in_flight:
                break
            self.engine_step()
            self.rows_are_dense_and_unique()
            self.blocks_are_accounted_for()
        assert not self.unfinished, f"not finished after {limit} steps: {list(self.unfinished)}"
        assert not self.in_flight
        assert self.manager.num_used_blocks == 0
        assert self.manager.num_free_cpu_blocks == self.manager.num_cpu_blocks
        assert (self.scheduler.num_running, self.scheduler.num_prefilling, self.scheduler.num_waiting) == (0, 0, 0)
        assert not self.scheduler.schedule()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = STATE_MACHINE
