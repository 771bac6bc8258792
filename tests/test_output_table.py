"""What requests have generated, by slot: the table against one list for each request."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mini_infer.output_table import FIRST_WIDTH, NOBODY, OutputTable
from mini_infer.step import Members, SampledTokens
from tests.hypothesis_profiles import STATE_MACHINE
from tests.simulated_device import NAN, sampled_tokens

TOKENS = st.sampled_from([5, 6, 7, 8])
STOPS = st.sampled_from([frozenset[int](), frozenset({7}), frozenset({7, 8}), frozenset({99, 2**40})])
LOGPROBS = st.sampled_from([-0.5, -1.0, -0.25, NAN])


@dataclass
class Outputs:
    """One request as it should be."""

    owner: int
    slot: int
    limit: int
    stop: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0


class OutputTableMachine(RuleBasedStateMachine):
    """Requests come and go; steps are launched for some of them, and come back late."""

    @initialize(num_slots=st.sampled_from([1, 2, 5]))
    def start(self, num_slots: int) -> None:
        self.table = OutputTable(num_slots)
        self.live: dict[int, Outputs] = {}
        self.launched: list[tuple[list[int], Members]] = []
        self.num_opened = 0

    @rule(limit=st.sampled_from([1, 3, 1000]), stop=STOPS)
    def open(self, limit: int, stop: frozenset[int]) -> None:
        owner = self.num_opened
        self.num_opened += 1
        slot = self.table.open(owner, limit, stop)
        assert slot not in {outputs.slot for outputs in self.live.values()}
        self.live[owner] = Outputs(owner, slot, limit, stop)

    @rule(index=st.integers(0, 9))
    def close(self, index: int) -> None:
        if index < len(self.live):
            outputs = self.live.pop(list(self.live)[index])
            self.table.close(outputs.slot, outputs.stop)

    @rule(mask=st.integers(1, 2**10 - 1))
    def launch(self, mask: int) -> None:
        chosen = [outputs for bit, outputs in enumerate(self.live.values()) if mask >> bit & 1]
        slots = np.array([outputs.slot for outputs in chosen], dtype=np.int64)
        self.launched.append(([outputs.owner for outputs in chosen], self.table.members(slots)))

    @rule(data=st.data())
    def read_back(self, data: st.DataObject) -> None:
        if not self.launched:
            return
        owners, members = self.launched.pop(0)
        size = len(owners)
        token_ids = data.draw(st.lists(TOKENS, min_size=size, max_size=size))
        logprobs = data.draw(st.lists(LOGPROBS, min_size=size, max_size=size))
        assert self.table.alive(members).tolist() == [owner in self.live for owner in owners]
        stops = frozenset().union(*(outputs.stop for outputs in self.live.values()))
        expected = []
        for index, (owner, token_id, logprob) in enumerate(zip(owners, token_ids, logprobs, strict=True)):
            outputs = self.live.get(owner)
            if outputs is None:
                continue
            if np.isnan(logprob):
                expected.append(index)
                continue
            outputs.tokens.append(token_id)
            outputs.logprob += logprob
            if len(outputs.tokens) == 1 or len(outputs.tokens) >= outputs.limit or token_id in stops:
                expected.append(index)
        assert self.table.take_in(members, sampled_tokens(token_ids, logprobs)).tolist() == expected

    @invariant()
    def every_slot_holds_its_owners_outputs(self) -> None:
        owners = {slot: owner for slot, owner in enumerate(self.table.owners.tolist()) if owner != NOBODY}
        assert owners == {outputs.slot: owner for owner, outputs in self.live.items()}
        for outputs in self.live.values():
            slot, count = outputs.slot, len(outputs.tokens)
            assert self.table.num_known[slot] == count
            assert self.table.tokens(slot, 0, count) == outputs.tokens
            assert self.table.tokens(slot, count // 2, count + 5) == outputs.tokens[count // 2 :]
            assert self.table.logprobs[slot] == outputs.logprob


TestOutputTableMachine = OutputTableMachine.TestCase
TestOutputTableMachine.settings = STATE_MACHINE


def step(table: OutputTable, slots: list[int], token_ids: list[int]) -> list[int]:
    sampled = SampledTokens(np.array(token_ids, dtype=np.int32), np.full(len(token_ids), -1.0, dtype=np.float32))
    return table.take_in(table.members(np.array(slots, dtype=np.int64)), sampled).tolist()


def test_it_grows_with_the_longest_output() -> None:
    table = OutputTable(2)
    slots = [table.open(0, 1000, ()), table.open(1, 1000, ())]
    for index in range(3 * FIRST_WIDTH):
        step(table, slots, [index, index + 1])
    assert table.tokens(slots[0], 0, 1000) == list(range(3 * FIRST_WIDTH))
    assert table.tokens(slots[1], 0, 1000) == list(range(1, 3 * FIRST_WIDTH + 1))


def test_a_slot_that_is_used_again_has_nothing_of_its_last_owner() -> None:
    """A step of the last owner that comes back late is dropped."""
    table = OutputTable(1)
    slot = table.open(0, 5, ())
    late = table.members(np.array([slot]))
    step(table, [slot], [7])
    table.close(slot, ())
    assert table.open(1, 5, ()) == slot
    assert (table.num_known[slot], table.num_launched[slot], table.logprobs[slot]) == (0, 0, 0.0)
    assert table.take_in(late, sampled_tokens([8], [NAN])).size == 0
    assert table.tokens(slot, 0, 5) == []


def test_a_stop_token_is_looked_for_as_long_as_somebody_has_it() -> None:
    table = OutputTable(3)
    slots = [table.open(owner, 99, {7} if owner < 2 else ()) for owner in range(3)]
    step(table, slots, [1, 1, 1])
    assert step(table, slots[2:], [7]) == [0], "the caller knows whose it is"
    table.close(slots[0], {7})
    assert step(table, slots[2:], [7]) == [0]
    table.close(slots[1], {7})
    assert step(table, slots[2:], [7]) == []


def test_a_step_of_nobody() -> None:
    assert step(OutputTable(2), [], []) == []
