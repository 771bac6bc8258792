"""The layout of packed prompts, against one written down token by token."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.graphs.prefill_inputs import PrefillBuffer
from mini_infer.graphs.state import DecodeState
from mini_infer.sampling import MAX_SEED, SamplingParams
from mini_infer.step import PrefillChunk
from mini_infer.typing import NO_ROW
from tests.hypothesis_profiles import PROPERTY

CPU = torch.device("cpu")

SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    num_tokens: int
    max_chunks: int
    block_size: int
    max_blocks: int
    spare_row: int

    def buffer(self, device: torch.device = CPU) -> PrefillBuffer:
        return PrefillBuffer(
            self.num_tokens,
            self.max_chunks,
            block_size=self.block_size,
            max_blocks=self.max_blocks,
            state=DecodeState(self.spare_row, self.max_blocks, 10, device),
            device=device,
        )


shapes = st.builds(
    Shape,
    num_tokens=st.integers(1, 40),
    max_chunks=st.integers(1, 5),
    block_size=st.sampled_from([1, 2, 4, 8]),
    max_blocks=st.integers(1, 6),
    spare_row=st.integers(5, 9),
)


@st.composite
def chunks_for(draw: st.DrawFn, shape: Shape) -> list[PrefillChunk]:
    """Chunks that fit the shape: any start, tables of their own, with or without a row."""
    chunks: list[PrefillChunk] = []
    left = shape.num_tokens
    longest = shape.block_size * shape.max_blocks
    free_rows = list(range(shape.spare_row))
    for index in range(draw(st.integers(0, shape.max_chunks))):
        if not left:
            break
        count = draw(st.integers(1, min(left, longest)))
        start = draw(st.integers(0, longest - count))
        needed = -(-(start + count) // shape.block_size)
        table = draw(st.lists(st.integers(1, 1000), min_size=needed, max_size=shape.max_blocks, unique=True))
        row = draw(st.sampled_from([NO_ROW, *free_rows]))
        if row != NO_ROW:
            free_rows.remove(row)
        chunks.append(
            PrefillChunk(
                str(index),
                start,
                tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=count, max_size=count))),
                tuple(table),
                SamplingParams(
                    temperature=draw(st.sampled_from([0.0, 0.7, 1e6])),
                    top_p=draw(st.sampled_from([1.0, 0.1])),
                    top_k=draw(st.sampled_from([-1, 1, 2**31 - 1])),
                    min_p=draw(st.sampled_from([0.0, 0.3])),
                    repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
                    presence_penalty=draw(st.sampled_from([0.0, -1.5])),
                    frequency_penalty=draw(st.sampled_from([0.0, 0.5])),
                ),
                draw(st.sampled_from([0, 1, 2**32, 2**40 + 7, MAX_SEED])),
                is_last=row != NO_ROW,
                row=row,
            )
        )
        left -= count
    return chunks


def oracle(shape: Shape, chunks: list[PrefillChunk]) -> dict[str, list[Any]]:
    """The layout, token by token. Padding: sequences of at most a whole table, all on the null block."""
    longest = shape.block_size * shape.max_blocks
    num_seqs = shape.max_chunks + -(-shape.num_tokens // longest)
    padding = shape.num_tokens - sum(len(chunk.token_ids) for chunk in chunks)
    # (token ids, start, table, row, sampling, seed) of each sequence
    neutral = SamplingParams(temperature=0.0)
    sequences: list[Any] = [(c.token_ids, c.start, c.block_table, c.row, c.sampling, c.seed) for c in chunks]
    while padding:
        count = min(padding, longest)
        sequences.append(((0,) * count, 0, (), NO_ROW, neutral, 0))
        padding -= count
    sequences += [((), 0, (), NO_ROW, neutral, 0)] * (num_seqs - len(sequences))
    expected: dict[str, list[Any]] = {
        name: []
        for name in (
            "token_ids", "positions", "slot_mapping", "block_tables", "context_lens", "query_start_loc", "last_tokens",
            "rows", "seeds", "count_rows", *SAMPLING,
        )
    }  # fmt: skip
    for token_ids, start, table, row, sampling, seed in sequences:
        full_table = [*table, *[0] * (shape.max_blocks - len(table))]
        expected["query_start_loc"].append(len(expected["token_ids"]))
        for position, token_id in enumerate(token_ids, start=start):
            block = full_table[position // shape.block_size]
            expected["token_ids"].append(token_id)
            expected["positions"].append(position)
            expected["slot_mapping"].append(block * shape.block_size + position % shape.block_size)
        expected["block_tables"].append(full_table)
        expected["context_lens"].append(start + len(token_ids) if token_ids else 0)
        expected["last_tokens"].append(len(expected["token_ids"]) - 1)
        expected["rows"].append(shape.spare_row if row == NO_ROW else row)
        for name in SAMPLING:
            expected[name].append(getattr(sampling, name))
        expected["seeds"].append(seed)
        expected["count_rows"].append(row if row != NO_ROW and sampling.has_penalties else -1)
    expected["query_start_loc"].append(len(expected["token_ids"]))
    return expected


def tensors(buffer: PrefillBuffer) -> dict[str, torch.Tensor]:
    inputs = buffer.inputs
    sampling = inputs.sampling
    return {
        **{
            name: getattr(inputs, name)
            for name in (
                "token_ids", "positions", "slot_mapping", "block_tables", "context_lens", "query_start_loc",
                "last_tokens", "rows",
            )
        },
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seeds")},
        "repetition_penalty": sampling.penalties.repetition,
        "presence_penalty": sampling.penalties.presence,
        "frequency_penalty": sampling.penalties.frequency,
        "count_rows": sampling.penalties.count_rows,
    }  # fmt: skip


def check(buffer: PrefillBuffer, shape: Shape, chunks: list[PrefillChunk]) -> None:
    expected = oracle(shape, chunks)
    for name, tensor in tensors(buffer).items():
        assert tensor.tolist() == torch.tensor(expected[name], dtype=tensor.dtype).tolist(), name


@PROPERTY
@given(data=st.data())
def test_layout(data: st.DataObject) -> None:
    """Two fills of one buffer: each is exactly what the oracle lays out, so nothing of the first is left in the
    second, and the views stay where they were."""
    shape = data.draw(shapes)
    buffer = shape.buffer()
    addresses = {name: tensor.data_ptr() for name, tensor in tensors(buffer).items()}
    for _ in range(2):
        chunks = data.draw(chunks_for(shape))
        buffer.fill(chunks)
        check(buffer, shape, chunks)
    assert {name: tensor.data_ptr() for name, tensor in tensors(buffer).items()} == addresses


@PROPERTY
@given(data=st.data())
def test_what_the_kernels_rely_on(data: st.DataObject) -> None:
    """Chunks tile the bucket, no sequence outgrows its table, those without tokens come last, tokens of real sequences
    never share a slot with padding, and padding stays in the null block."""
    shape = data.draw(shapes)
    chunks = data.draw(chunks_for(shape))
    buffer = shape.buffer()
    buffer.fill(chunks)
    inputs = buffer.inputs
    starts = inputs.query_start_loc.tolist()
    assert starts[0] == 0
    assert starts[-1] == shape.num_tokens
    assert starts == sorted(starts)
    lengths = inputs.context_lens.tolist()
    assert max(lengths) <= shape.block_size * shape.max_blocks
    used = [stop > start for start, stop in itertools.pairwise(starts)]
    assert used == sorted(used, reverse=True)
    assert used == [length > 0 for length in lengths]
    assert 0 <= int(inputs.last_tokens.min()) <= int(inputs.last_tokens.max()) < shape.num_tokens
    num_real = sum(len(chunk.token_ids) for chunk in chunks)
    assert bool((inputs.slot_mapping[:num_real] >= shape.block_size).all())
    assert bool((inputs.slot_mapping[num_real:] < shape.block_size).all())


def test_types() -> None:
    """What the kernels take: int32 but for seeds, float32 thresholds, everything dense."""
    for name, tensor in tensors(Shape(7, 3, 4, 2, 5).buffer()).items():
        floats = name in SAMPLING and name != "top_k"
        expected = torch.float32 if floats else torch.int64 if name == "seeds" else torch.int32
        assert tensor.dtype == expected, name
        assert tensor.is_contiguous(), name
        assert tensor.data_ptr() % 16 == 0, f"{name}: kernels would be compiled anew for it"


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """The same layout, by one copy, in place."""
    shape = Shape(30, 3, 4, 3, 6)
    buffer = shape.buffer(torch.device("cuda"))
    addresses = {name: tensor.data_ptr() for name, tensor in tensors(buffer).items()}
    params = SamplingParams(temperature=0.5, top_k=7)
    first = PrefillChunk("a", 2, (5, 6, 7), (9, 8), params, MAX_SEED, is_last=True, row=4)
    second = PrefillChunk("b", 0, (1,), (3,), params, 5, is_last=False)
    for chunks in ([first, second], [second], []):
        buffer.fill(chunks)
        check(buffer, shape, chunks)
    assert {name: tensor.data_ptr() for name, tensor in tensors(buffer).items()} == addresses


def test_buffers_that_share_memory() -> None:
    """A smaller buffer in the memory of a larger one: each is as if it were alone, whichever was filled before."""
    large, small = Shape(40, 5, 4, 6, 5), Shape(8, 3, 4, 6, 5)
    first = large.buffer()
    options: dict[str, Any] = {"block_size": 4, "max_blocks": 6, "state": DecodeState(5, 6, 10, CPU), "device": CPU}
    second = PrefillBuffer(8, 3, **options, storage=first.storage)
    assert second.storage.data_ptr() == first.storage.data_ptr()
    for shape, buffer in ((large, first), (small, second), (large, first)):
        chunk = PrefillChunk("a", 0, (3, 4, 5), (1,), SamplingParams(), 9, is_last=True, row=2)
        alone = shape.buffer()
        for filled in (buffer, alone):
            filled.fill([chunk])
        assert torch.equal(buffer.storage, alone.storage)
