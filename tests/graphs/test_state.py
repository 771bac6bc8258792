"""The decode rows on the device, against a plain Python model of what the edits and the steps make of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.graphs.state import DecodeState
from mini_infer.kernels.decode_frame import embed_rows
from mini_infer.sampling import MAX_SEED, MAX_TOP_K, SamplingParams
from mini_infer.step import ClearRow, ExtendRow, History, MoveRow, PlaceRow, RowEdit
from tests.hypothesis_profiles import PROPERTY

CPU = torch.device("cpu")
MAX_BLOCKS = 5
VOCAB = 40
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1e6, top_k=MAX_TOP_K, top_p=0.001, min_p=1.0),
    SamplingParams(temperature=0.1, top_k=1, top_p=0.9, min_p=0.05),
    SamplingParams(repetition_penalty=1.3, presence_penalty=-2.0, frequency_penalty=0.7),
]
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Row:
    """One row as it should be; the defaults are a padded one."""

    token: int = 0
    seq_len: int = 0
    table: tuple[int, ...] = (0,) * MAX_BLOCKS
    active: int = 0
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    seed: int = 0
    seen: tuple[int, ...] | None = None  # the token counts of a row with penalties


PADDED = Row()


class Model:
    """The state in plain Python, edited one edit at a time."""

    def __init__(self, num_rows: int) -> None:
        self.rows = [PADDED] * num_rows

    def edit(self, edit: RowEdit) -> None:
        if isinstance(edit, PlaceRow):
            table = edit.block_table + (0,) * (MAX_BLOCKS - len(edit.block_table))
            seen = None if edit.history is None else counts_of(edit.history)
            self.rows[edit.row] = Row(edit.token_id or 0, edit.seq_len, table, 1, edit.sampling, edit.seed, seen)
        elif isinstance(edit, MoveRow):
            self.rows[edit.target] = self.rows[edit.source]
        elif isinstance(edit, ExtendRow):
            table = list(self.rows[edit.row].table)
            table[edit.start : edit.start + len(edit.block_ids)] = edit.block_ids
            self.rows[edit.row] = replace(self.rows[edit.row], table=tuple(table))
        else:
            self.rows[edit.row] = PADDED

    def decode(self, tokens: list[int]) -> None:
        for index, token in enumerate(tokens):
            row = self.rows[index]
            if row.active:
                seen = None
                if row.seen is not None:
                    seen = tuple(count + 2 * (other == row.token) for other, count in enumerate(row.seen))
                self.rows[index] = replace(row, token=token, seq_len=row.seq_len + 1, seen=seen)


def counts_of(history: History) -> tuple[int, ...]:
    return tuple(
        2 * history.output_token_ids.count(token) + (token in history.prompt_token_ids) for token in range(VOCAB)
    )


def decode(state: DecodeState, bucket: int, sampled: list[int]) -> None:
    """What a decode step does to the rows, without a model."""
    state.advanced(bucket)
    rows = state.rows(bucket)
    penalties = rows.sampling.penalties
    embedding = torch.zeros(VOCAB, 1, device=rows.token_ids.device)
    embed_rows(
        rows.token_ids,
        rows.seq_lens,
        rows.block_tables,
        embedding,
        1 << 20,
        penalties.count_rows,
        penalties.token_counts,
    )
    device = rows.token_ids.device
    rows.advance(torch.tensor(sampled, dtype=torch.int64, device=device), torch.zeros(bucket, device=device))


def read(state: DecodeState, bucket: int) -> list[Row]:
    """The device's rows; the sampling parameters as float32 holds them."""
    rows = state.rows(bucket)
    sampling = rows.sampling
    penalties = sampling.penalties
    return [
        Row(
            int(rows.token_ids[i]),
            int(rows.seq_lens[i]),
            tuple(rows.block_tables[i].tolist()),
            int(rows.active[i]),
            SamplingParams(
                temperature=float(sampling.temperature[i]),
                top_k=int(sampling.top_k[i]),
                top_p=float(sampling.top_p[i]),
                min_p=float(sampling.min_p[i]),
                repetition_penalty=float(penalties.repetition[i]),
                presence_penalty=float(penalties.presence[i]),
                frequency_penalty=float(penalties.frequency[i]),
            ),
            int(sampling.seeds[i]),
            None if penalties.count_rows[i] < 0 else tuple(penalties.token_counts[penalties.count_rows[i]].tolist()),
        )
        for i in range(bucket)
    ]


def as_float32(row: Row) -> Row:
    params = row.params
    rounded = {name: float(torch.tensor(getattr(params, name))) for name in FLOATS}
    return replace(row, params=SamplingParams(top_k=params.top_k, **rounded))


def addresses(state: DecodeState, bucket: int) -> list[int]:
    rows = state.rows(bucket)
    sampling = rows.sampling
    tensors = [rows.token_ids, rows.seq_lens, rows.block_tables, rows.active]
    tensors += [sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seeds]
    tensors += sampling.penalties
    return [tensor.data_ptr() for tensor in tensors]


token_ids = st.integers(0, VOCAB - 1)
block_ids = st.integers(1, 2**31 - 1)


@st.composite
def edits(draw: st.DrawFn, model: Model) -> RowEdit:
    """Any edit that the rows of ``model`` allow."""
    used = [index for index, row in enumerate(model.rows) if row.active]
    free = [index for index, row in enumerate(model.rows) if not row.active]
    kinds = [ClearRow, *([PlaceRow] if free else []), *([ExtendRow] if used else []), *([MoveRow] if used else [])]
    kind = draw(st.sampled_from(kinds))
    if kind is PlaceRow:
        params = draw(st.sampled_from(PARAMS))
        histories = st.builds(History, *[st.lists(token_ids, max_size=6).map(tuple)] * 2)
        return PlaceRow(
            draw(st.sampled_from(free)),
            draw(st.none() | token_ids),
            draw(st.integers(1, 1000)),
            tuple(draw(st.lists(block_ids, min_size=1, max_size=MAX_BLOCKS))),
            params,
            draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, MAX_SEED])),
            draw(histories) if params.has_penalties else None,
        )
    if kind is ExtendRow:
        start = draw(st.integers(0, MAX_BLOCKS))
        added = draw(st.lists(block_ids, max_size=MAX_BLOCKS - start))
        return ExtendRow(draw(st.sampled_from(used)), start, tuple(added))
    if kind is MoveRow:
        return MoveRow(draw(st.sampled_from(used)), draw(st.integers(0, len(model.rows) - 1)))
    return ClearRow(draw(st.integers(0, len(model.rows) - 1)))


@PROPERTY
@given(data=st.data(), num_rows=st.integers(1, 6))
def test_rows_follow_edits_and_steps(data: st.DataObject, num_rows: int) -> None:
    """Rounds of edits, a prefill step that hands tokens to rows placed without one, and decode steps of any bucket:
    after each, every row on the device is the model's, padded rows are padded, and nothing has moved in memory."""
    state, model = DecodeState(num_rows, MAX_BLOCKS, VOCAB, CPU), Model(num_rows)
    assert read(state, num_rows) == [as_float32(PADDED)] * num_rows
    before = addresses(state, num_rows)
    for _ in range(data.draw(st.integers(1, 5), label="rounds")):
        batch: list[RowEdit] = []
        waiting: set[int] = set()  # rows that get their token from the step itself
        for _ in range(data.draw(st.integers(0, 5), label="edits")):
            edit = data.draw(edits(model))
            model.edit(edit)
            batch.append(edit)
            if isinstance(edit, MoveRow):
                source_waits = edit.source in waiting
                waiting.discard(edit.target)
                waiting |= {edit.target} if source_waits else set()
            elif not isinstance(edit, ExtendRow):
                waiting.discard(edit.row)
                waiting |= {edit.row} if isinstance(edit, PlaceRow) and edit.token_id is None else set()
        state.apply(batch)
        assert read(state, num_rows) == [as_float32(row) for row in model.rows]
        for row in sorted(waiting):  # as a prefill step stores what it sampled
            token = data.draw(token_ids)
            state.token_ids.index_copy_(0, torch.tensor([row, num_rows]), torch.tensor([token, 77]))
            model.rows[row] = replace(model.rows[row], token=token)
        for _ in range(data.draw(st.integers(0, 2), label="steps")):
            bucket = data.draw(st.integers(1, num_rows), label="bucket")
            sampled = data.draw(st.lists(token_ids, min_size=bucket, max_size=bucket))
            decode(state, bucket, sampled)
            model.decode(sampled)
        assert read(state, num_rows) == [as_float32(row) for row in model.rows]
    assert addresses(state, num_rows) == before


PLACE = PlaceRow(1, 9, 5, (4, 6), PARAMS[3], 11)


def test_rows_are_views_of_the_first() -> None:
    """Rows of a smaller bucket are the first of a larger one, at the same addresses."""
    state = DecodeState(8, MAX_BLOCKS, VOCAB, CPU)
    state.apply([PLACE])
    for bucket in range(1, 9):
        assert addresses(state, bucket) == addresses(state, 8)
        assert read(state, bucket) == read(state, 8)[:bucket]
    assert state.num_rows == 8


def test_a_padded_row_stays_padded() -> None:
    """Steps sample something for padded rows too: none of it is kept."""
    state = DecodeState(3, MAX_BLOCKS, VOCAB, CPU)
    state.apply([PLACE])
    for _ in range(50):
        decode(state, 3, [23, 24, 25])
    padded = as_float32(PADDED)
    assert read(state, 3) == [padded, as_float32(Row(24, 55, (4, 6, 0, 0, 0), 1, PARAMS[3], 11)), padded]


def test_the_mirror_follows_unsent_steps() -> None:
    """Lengths advance on the device between edits: an edit that resends a row must not set it back."""
    state = DecodeState(2, MAX_BLOCKS, VOCAB, CPU)
    state.apply([PLACE])
    for _ in range(3):
        decode(state, 2, [0, 30])
    state.apply([ExtendRow(1, 2, (8,))])
    assert read(state, 2)[1] == as_float32(Row(30, 8, (4, 6, 8, 0, 0), 1, PARAMS[3], 11))
    state.apply([MoveRow(1, 0), ClearRow(1)])
    assert read(state, 2) == [as_float32(Row(30, 8, (4, 6, 8, 0, 0), 1, PARAMS[3], 11)), as_float32(PADDED)]


def test_a_reused_row_has_nothing_of_its_predecessor() -> None:
    """A shorter table in the row of a longer one: the rest is null block."""
    state = DecodeState(2, MAX_BLOCKS, VOCAB, CPU)
    state.apply([PlaceRow(1, 3, 70, (1, 2, 3, 4, 5), PARAMS[2], MAX_SEED)])
    state.apply([PLACE])
    assert read(state, 2)[1] == as_float32(Row(9, 5, (4, 6, 0, 0, 0), 1, PARAMS[3], 11))


def test_no_edits_send_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the steady state the host does nothing; and a batch of edits is one copy, however many rows it touches."""
    state = DecodeState(4, MAX_BLOCKS, VOCAB, CPU)
    calls = []
    monkeypatch.setattr("mini_infer.graphs.state.edit_rows", lambda stage, *tensors: calls.append(stage.shape[0]))
    state.apply([])
    state.apply(())
    assert calls == []
    state.apply([PLACE, replace(PLACE, row=2), ClearRow(2), MoveRow(1, 0), ExtendRow(0, 1, (3,))])
    assert calls == [3]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The same edits on a GPU give the same rows."""
    states = [DecodeState(4, MAX_BLOCKS, VOCAB, torch.device(name)) for name in ("cpu", "cuda")]
    penalized = PlaceRow(2, 12, 5, (4, 6), PARAMS[4], MAX_SEED, History((3, 3, 12), (7, 1, 7)))
    for state in states:
        state.apply([PLACE, penalized])
        for _ in range(3):
            decode(state, 3, [5, 6, 7])
        state.apply([MoveRow(2, 0), ClearRow(2), ExtendRow(1, 3, (9, 8))])
    assert read(states[0], 4) == read(states[1], 4)
