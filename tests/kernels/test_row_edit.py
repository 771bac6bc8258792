"""Editing rows of the decode state."""

import random

import pytest
import torch

from mini_infer.kernels.row_edit import FIELDS, HEADER, SEED, _launch_edit_rows, edit_rows


def bits(value):
    """A float32's bits as an integer."""
    return int(torch.tensor([value], dtype=torch.float32).view(torch.int32))


def halves(seed):
    """Low and high half of a 63-bit seed, as signed 32-bit integers."""
    return [int(half) for half in torch.tensor([seed], dtype=torch.int64).view(torch.int32)]


def random_state(draw, num_rows, max_blocks, spare=1):
    """Tokens, fields, seeds and tables as lists."""
    return {
        "tokens": [draw.randrange(2**40) for _ in range(num_rows + spare)],
        "fields": [[draw.randrange(-(2**31), 2**31) for _ in range(num_rows)] for _ in FIELDS],
        "seeds": [draw.randrange(2**63) for _ in range(num_rows)],
        "tables": [[draw.randrange(2**31) for _ in range(max_blocks)] for _ in range(num_rows)],
    }


def random_edits(draw, num_rows, max_blocks, count):
    """(row, source or -1, token, fields, seed, table) of ``count`` different rows."""
    return [
        (
            row,
            draw.choice([-1, draw.randrange(num_rows), row]),
            draw.randrange(2**31),
            [draw.randrange(-(2**31), 2**31) for _ in FIELDS],
            draw.choice([0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, draw.randrange(2**63)]),
            [draw.randrange(2**31) for _ in range(max_blocks)],
        )
        for row in draw.sample(range(num_rows), count)
    ]


def expected_state(state, edits):
    """The edits made one by one on the lists; tokens move from where they were before all edits."""
    new = {name: [list(x) if isinstance(x, list) else x for x in values] for name, values in state.items()}
    for row, source, token, fields, seed, table in edits:
        new["tokens"][row] = token if source < 0 else state["tokens"][source]
        for field, value in zip(new["fields"], fields, strict=True):
            field[row] = value
        new["seeds"][row] = seed
        new["tables"][row] = list(table)
    return new


def tensors_of(state, device):
    kinds = {"tokens": torch.int64, "fields": torch.int32, "seeds": torch.int64, "tables": torch.int32}
    return {name: torch.tensor(state[name], dtype=kinds[name], device=device) for name in kinds}


def stage_of(edits, device):
    lines = [
        [row, source, token, *fields, 0x5A5A5A5A, *halves(seed), *table]
        for row, source, token, fields, seed, table in edits
    ]
    return torch.tensor(lines, dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    "num_rows,max_blocks,count", [(1, 1, 1), (5, 3, 5), (7, 17, 2), (9, 40, 9), (4, 1030, 2), (33, 6, 20)]
)
def test_random_edits(backend, num_rows, max_blocks, count):
    """Against a plain Python model: every row of the call is written whole, every other one keeps every bit."""
    if backend.small and count > 9:
        count = 6
    for seed in range(1 if max_blocks > 1000 else 6):
        draw = random.Random(seed)
        state = random_state(draw, num_rows, max_blocks)
        edits = random_edits(draw, num_rows, max_blocks, count)
        tensors = tensors_of(state, backend.device)
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        backend.pick(edit_rows, _launch_edit_rows)(stage_of(edits, backend.device), *tensors.values())
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == expected_state(state, edits)
        assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == addresses


def test_rows_change_places(backend):
    """Rows that take one another's token in a ring: all read what was there before."""
    num_rows = 6
    state = random_state(random.Random(0), num_rows, 2)
    edits = [(row, (row + 1) % num_rows, 7, [1] * len(FIELDS), row, [row, row]) for row in range(num_rows)]
    tensors = tensors_of(state, backend.device)
    backend.pick(edit_rows, _launch_edit_rows)(stage_of(edits, backend.device), *tensors.values())
    before = state["tokens"]
    assert tensors["tokens"].tolist() == [*before[1:num_rows], before[0], before[num_rows]]


def test_floats_keep_their_bits(backend):
    """Temperatures and thresholds travel as bits: nothing is rounded, denormals and -0.0 included."""
    values = (0.0, 0.1, 1e-45)
    state = random_state(random.Random(1), 2, 1)
    first = FIELDS.index("temperature")
    edits = [(1, -1, 3, [*range(first), *map(bits, values), 7, 8, 9], 5, [4])]
    tensors = tensors_of(state, backend.device)
    backend.pick(edit_rows, _launch_edit_rows)(stage_of(edits, backend.device), *tensors.values())
    assert tensors["fields"][first : first + 3].view(torch.float32)[:, 1].tolist() == torch.tensor(values).tolist()
    assert FIELDS[first : first + 3] == ("temperature", "top_p", "min_p")


def test_layout_of_a_line():
    """The header holds row, source, token, the fields and the seed, and the table comes after it."""
    assert 3 + len(FIELDS) <= SEED
    assert HEADER == SEED + 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device):
    """Schema, mutated arguments and the fake agree with what the op does."""
    draw = random.Random(2)
    state = random_state(draw, 5, 3)
    tensors = tensors_of(state, device)
    stage = stage_of(random_edits(draw, 5, 3, 3), device)
    torch.library.opcheck(torch.ops.mini_infer.edit_rows.default, (stage, *tensors.values()))


def test_bad_arguments():
    """Shapes and dtypes that do not fit are named."""
    tensors = tensors_of(random_state(random.Random(3), 4, 3), "cpu")
    stage = stage_of(random_edits(random.Random(3), 4, 3, 2), "cpu")
    everything = tuple(tensors.values())
    with pytest.raises(ValueError, match=rf"stage must be int32 \[num_edits, {HEADER + 3}\]"):
        edit_rows(stage[:, :-1], *everything)
    with pytest.raises(ValueError, match="stage must be int32"):
        edit_rows(stage.long(), *everything)
    with pytest.raises(ValueError, match=r"fields must be int32 \[10, 4\]"):
        edit_rows(stage, tensors["tokens"], tensors["fields"][:5], tensors["seeds"], tensors["tables"])
    with pytest.raises(ValueError, match="fields must be int32"):
        edit_rows(stage, tensors["tokens"], tensors["fields"].float(), tensors["seeds"], tensors["tables"])
