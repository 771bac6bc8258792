"""How many blocks a row gets, and that it gives back what it does not need."""

from __future__ import annotations

import pytest

from mini_infer.growth import MAX_BLOCKS_AT_ONCE, BlockGrowth
from mini_infer.memory import BlockManager
from mini_infer.output_table import OutputTable
from mini_infer.request import Request, RequestStatus
from mini_infer.rows import RowTable
from mini_infer.sampling import SamplingParams
from mini_infer.step import ExtendRow


class Batch:
    """Rows with prompts of ``lengths`` tokens, in blocks of 4."""

    def __init__(self, *lengths: int, num_gpu_blocks: int, max_output_tokens: int = 100) -> None:
        self.manager = BlockManager(4, num_gpu_blocks, enable_prefix_caching=False)
        self.outputs = OutputTable(len(lengths))
        self.rows = RowTable(len(lengths), self.outputs)
        self.growth = BlockGrowth(self.manager, self.rows)
        self.requests = []
        for number, length in enumerate(lengths):
            request = Request(
                f"r{number}", (1,) * length, SamplingParams(), max_output_tokens=max_output_tokens, arrival=number
            )
            request.enter(self.outputs)
            assert self.manager.allocate_sequence(request.request_id, request.prompt_token_ids) is not None
            request.status = RequestStatus.RUNNING
            self.outputs.num_launched[request.slot] = 1
            name = request.request_id
            self.rows.enter(request, self.manager.table(name), self.manager.capacity(name), token_id=None)
            self.requests.append(request)
        self.rows.take_edits()

    def table(self, number: int) -> list[int]:
        return self.manager.table(f"r{number}")


@pytest.mark.parametrize(
    ("num_free", "expected"),
    [(0, 1), (1, 1), (3, 1), (4, 1), (6, 2), (9, 3), (10, 4), (100, MAX_BLOCKS_AT_ONCE)],
)
def test_everybody_could_have_as_many_and_one_for_each_would_be_left(num_free: int, expected: int) -> None:
    batch = Batch(4, 4, num_gpu_blocks=2 + num_free)
    assert batch.growth.blocks_at_once() == expected


def test_no_more_than_the_longest_output_needs() -> None:
    batch = Batch(4, num_gpu_blocks=20, max_output_tokens=6)
    assert batch.growth.extend(batch.requests[0], 4)
    assert len(batch.table(0)) == 3, "4 + 5 tokens: the last one's K/V is never written"
    assert batch.rows.take_edits() == (ExtendRow(0, 1, tuple(batch.table(0)[1:])),)


def test_too_few_blocks_change_nothing() -> None:
    batch = Batch(4, num_gpu_blocks=3)
    assert not batch.growth.extend(batch.requests[0], 3)
    assert len(batch.table(0)) == 1 and batch.rows.take_edits() == ()
    assert batch.growth.extend(batch.requests[0], 2)


def test_those_that_need_blocks_soon_are_extended_with_the_others() -> None:
    """Within a block's length, that is: 4 tokens."""
    batch = Batch(4, 5, 8, num_gpu_blocks=40)
    assert batch.rows.short_of_blocks() == [batch.requests[0], batch.requests[2]]
    for request in batch.rows.short_of_blocks():
        batch.growth.extend(request, 4)
    batch.growth.extend_soon(4)
    assert [len(batch.table(number)) for number in range(3)] == [5, 6, 6]
    assert batch.rows.short_of_blocks(ahead=12) == []
    assert len(batch.rows.take_edits()) == 3


def test_rows_at_the_end_of_their_output_are_not_extended_again() -> None:
    batch = Batch(4, num_gpu_blocks=40, max_output_tokens=5)
    batch.growth.extend(batch.requests[0], 4)
    batch.rows.take_edits()
    batch.growth.extend_soon(4)
    assert batch.rows.take_edits() == ()


def test_what_was_given_ahead_is_taken_back_to_the_last_block() -> None:
    """The next token keeps its place; the device is told nothing, and overwrites the entries when the row grows."""
    batch = Batch(4, 7, num_gpu_blocks=40)
    assert not batch.growth.take_back()
    for request in batch.requests:
        batch.growth.extend(request, 3)
    batch.rows.take_edits()
    free = batch.manager.num_free_blocks
    assert batch.growth.take_back() and not batch.growth.take_back()
    assert [len(batch.table(number)) for number in range(2)] == [2, 2]
    assert batch.manager.num_free_blocks == free + 2 + 3
    assert batch.rows.take_edits() == () and batch.rows.short_of_blocks() == []
    assert batch.growth.extend(batch.requests[1], 1)
    assert batch.rows.take_edits() == (ExtendRow(1, 2, (batch.table(1)[2],)),)
