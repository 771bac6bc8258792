"""Captured steps on a GPU: a replay is the eager step, writes nothing but its own slots, and its memory never moves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mini_infer.exceptions import ConfigError
from mini_infer.graphs.capture import GraphSet
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.spec import ModelSpec
from mini_infer.loader import load_params, read_model_files
from mini_infer.runner import ModelRunner
from mini_infer.sampling import SamplingParams
from mini_infer.step import (
    ClearRow,
    History,
    MoveRow,
    PlaceRow,
    PrefillChunk,
    RowEdit,
    SampledTokens,
    SchedulerOutputs,
    StepKind,
)
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.gpu

BLOCK_SIZE = 16
MAX_ROWS = 12
MAX_LEN = 128
BLOCKS_PER_ROW = MAX_LEN // BLOCK_SIZE
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
PENALIZED = SamplingParams(temperature=0.0, max_tokens=64, repetition_penalty=1.5, frequency_penalty=0.5)


@dataclass(frozen=True)
class Weights:
    spec: ModelSpec
    params: Params
    dtype: torch.dtype


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder: Path = tmp_path_factory.mktemp("model")
    make_tiny_model("llama-head-64", folder)
    files = read_model_files(folder)
    params = load_params(files, dtype=request.param, device=torch.device("cuda"), max_positions=MAX_LEN)
    return Weights(files.spec, params, request.param)


def make_runner(weights: Weights, *, captured: bool) -> ModelRunner:
    runner = bare_runner(weights)
    if captured:
        capture(runner)
    return runner


def capture(runner: ModelRunner) -> GraphSet:
    return runner.capture(range(1, MAX_ROWS + 1), [64, 256], max_chunks=MAX_ROWS)


def bare_runner(weights: Weights) -> ModelRunner:
    return ModelRunner(
        weights.spec,
        weights.params,
        device=torch.device("cuda"),
        dtype=weights.dtype,
        num_gpu_blocks=MAX_ROWS * BLOCKS_PER_ROW,
        num_cpu_blocks=0,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_ROWS,
        max_model_len=MAX_LEN,
    )


def table(row: int) -> tuple[int, ...]:
    return tuple(range(1 + row * BLOCKS_PER_ROW, 1 + (row + 1) * BLOCKS_PER_ROW))


def prompts_of(count: int) -> list[tuple[int, ...]]:
    draw = random.Random(count)
    return [tuple(draw.randrange(3, 320) for _ in range(draw.randint(1, 20))) for _ in range(count)]


def run(runner: ModelRunner, outputs: SchedulerOutputs) -> SampledTokens:
    runner.prepare(outputs)
    return runner.execute(outputs).result()


def prefill(runner: ModelRunner, prompts: list[tuple[int, ...]]) -> SampledTokens:
    """Prompt i goes to row i."""
    chunks = tuple(
        PrefillChunk(str(row), 0, prompt, table(row), (GREEDY, PENALIZED)[row % 2], 0, is_last=True, row=row)
        for row, prompt in enumerate(prompts)
    )
    edits = tuple(
        PlaceRow(
            row,
            None,
            len(prompt) + 1,
            table(row),
            (GREEDY, PENALIZED)[row % 2],
            0,
            (None, History(tuple(prompt), ()))[row % 2],
        )
        for row, prompt in enumerate(prompts)
    )
    names = tuple(chunk.request_id for chunk in chunks)
    return run(runner, SchedulerOutputs(1, StepKind.PREFILL, 256, names, chunks, edits))


def decode(runner: ModelRunner, num_seqs: int, bucket: int) -> SampledTokens:
    return run(runner, SchedulerOutputs(2, StepKind.DECODE, bucket, tuple(map(str, range(num_seqs)))))


@pytest.fixture(scope="module")
def pair(weights: Weights) -> Iterator[tuple[ModelRunner, ModelRunner]]:
    yield make_runner(weights, captured=True), make_runner(weights, captured=False)


def clear(runner: ModelRunner) -> None:
    runner.prepare(SchedulerOutputs(0, StepKind.IDLE, edits=tuple(ClearRow(row) for row in range(MAX_ROWS))))


@pytest.mark.parametrize("num_seqs", range(1, MAX_ROWS + 1))
def test_replay_equals_eager(weights: Weights, pair: tuple[ModelRunner, ModelRunner], num_seqs: int) -> None:
    """For every number of rows, and with padded ones: the same tokens, and log probabilities as close as can be."""
    captured, eager = pair
    prompts = prompts_of(num_seqs)
    for runner in pair:
        clear(runner)
    steps = [(prefill(captured, prompts), prefill(eager, prompts))]
    for step in range(6):
        bucket = num_seqs if step % 2 else MAX_ROWS
        steps.append((decode(captured, num_seqs, bucket), decode(eager, num_seqs, bucket)))
    for ours, expected in steps:
        assert ours.token_ids.tolist() == expected.token_ids.tolist()
        assert ours.logprobs == pytest.approx(expected.logprobs, abs=1e-4 if weights.dtype is torch.float32 else 5e-2)


def kv_of(runner: ModelRunner) -> KVCache:
    return runner._kv


def test_only_its_own_slots(weights: Weights) -> None:
    """A decode replay writes each row's newest slot, the null block, and no other byte of the KV cache."""
    runner = make_runner(weights, captured=True)
    prompts = prompts_of(5)
    kv_of(runner).blocks.normal_()
    prefill(runner, prompts)
    before = kv_of(runner).blocks.clone()
    decode(runner, 5, 8)
    changed = (
        (kv_of(runner).blocks != before).any(dim=-1).any(dim=3).any(dim=1).any(dim=0)
    )  # [num_blocks + 1, block_size]
    written = {(int(block), int(slot)) for block, slot in changed.nonzero()}
    own = {(table(row)[len(p) // BLOCK_SIZE], len(p) % BLOCK_SIZE) for row, p in enumerate(prompts)}
    assert {place for place in written if place[0] != 0} == own


def test_noise_beyond_the_lengths(weights: Weights) -> None:
    """Whatever lies in the cache beyond a sequence's length, the null block included, changes no token."""
    results = []
    for noise in (0.0, 1e3):
        runner = make_runner(weights, captured=True)
        kv_of(runner).blocks.normal_(0.0, max(noise, 1e-3))
        prompts = prompts_of(7)
        steps = [prefill(runner, prompts)] + [decode(runner, 7, 9) for _ in range(4)]
        results.append([(step.token_ids.tolist(), step.logprobs.tolist()) for step in steps])
    assert results[0] == results[1]


def test_addresses_never_move(weights: Weights) -> None:
    """A thousand membership edits and hundreds of replays leave every tensor that the graphs know where it was."""
    runner = make_runner(weights, captured=True)
    rows = runner._state.rows(MAX_ROWS)
    tensors = [rows.token_ids, rows.seq_lens, rows.block_tables, rows.active, rows.sampling.seeds, kv_of(runner).blocks]
    before = [tensor.data_ptr() for tensor in tensors]
    draw = random.Random(0)
    for _ in range(350):
        row, other = draw.sample(range(MAX_ROWS), 2)
        edits = (
            PlaceRow(row, draw.randrange(320), draw.randint(1, 100), table(row), GREEDY, draw.randrange(2**62)),
            MoveRow(row, other),
            ClearRow(row),
        )
        run(runner, SchedulerOutputs(1, StepKind.DECODE, MAX_ROWS, ("a",), edits=edits))
    again = runner._state.rows(MAX_ROWS)
    after = [again.token_ids, again.seq_lens, again.block_tables, again.active, again.sampling.seeds]
    assert [tensor.data_ptr() for tensor in [*after, kv_of(runner).blocks]] == before


def test_state_follows_the_edits(weights: Weights) -> None:
    """After each of a thousand random edits between replays, the device's rows are those of a model on the host."""
    runner = make_runner(weights, captured=True)
    draw = random.Random(1)
    expected: dict[int, tuple[int, int]] = {}  # row -> (seq_len, seed) of the rows in use
    for _ in range(1000):
        row, other = draw.sample(range(MAX_ROWS), 2)
        edit: RowEdit
        if row in expected and expected[row][0] > 90:  # before it outgrows its table
            del expected[row]
            edit = ClearRow(row)
        elif row in expected and draw.random() < 0.5:
            expected[other] = expected[row]
            edit = MoveRow(row, other)
        else:
            expected[row] = draw.randint(1, 20), draw.randrange(2**62)
            edit = PlaceRow(row, draw.randrange(320), expected[row][0], table(row), GREEDY, expected[row][1])
        edits = [edit]
        for old in [r for r, (length, _) in expected.items() if length > 100]:
            del expected[old]
            edits.append(ClearRow(old))
        names = tuple(map(str, range(MAX_ROWS)))
        run(runner, SchedulerOutputs(1, StepKind.DECODE, MAX_ROWS, names, edits=tuple(edits)))
        expected = {r: (length + 1, seed) for r, (length, seed) in expected.items()}
        rows = runner._state.rows(MAX_ROWS)
        state = list(zip(rows.seq_lens.tolist(), rows.sampling.seeds.tolist(), rows.active.tolist(), strict=True))
        tokens = rows.token_ids.tolist()
        for r in range(MAX_ROWS):
            assert state[r] == ((*expected[r], 1) if r in expected else (0, 0, 0))
            assert r in expected or tokens[r] == 0


@pytest.mark.alone
def test_the_set_knows_its_graphs(weights: Weights) -> None:
    """Sizes by kind, a record for each in the order of capture, and the bytes of all; what is dropped is gone."""
    runner = bare_runner(weights)
    graphs = capture(runner)
    assert graphs.sizes(StepKind.DECODE) == frozenset(range(1, MAX_ROWS + 1))
    assert graphs.sizes(StepKind.PREFILL) == {64, 256}
    assert [record.bucket for record in graphs.ledger] == [256, 64, *range(MAX_ROWS, 0, -1)]
    assert all(record.seconds > 0 for record in graphs.ledger)
    assert graphs.bytes >= sum(record.bytes for record in graphs.ledger) > 0
    dropped = graphs.keep(StepKind.DECODE, (2, 5, MAX_ROWS))
    assert sorted(record.bucket for record in dropped) == sorted({*range(1, MAX_ROWS)} - {2, 5})
    assert graphs.sizes(StepKind.DECODE) == {2, 5, MAX_ROWS}
    assert graphs.sizes(StepKind.PREFILL) == {64, 256}
    assert [record.bucket for record in graphs.ledger] == [256, 64, MAX_ROWS, 5, 2]
    clear(runner)
    decode(runner, 5, 5)
    with pytest.raises(ConfigError, match=r"no graph for decode bucket 4; there are \[2, 5, 12\]"):
        decode(runner, 4, 4)
    with pytest.raises(ConfigError, match=r"no graph for prefill bucket 32; there are \[64, 256\]"):
        graphs.prefill((), 32)


@pytest.mark.alone
def test_the_pool_is_shared(weights: Weights) -> None:
    """The largest step's graph brings the memory; the smaller ones of its kind add their own nodes and little else."""
    ledger = capture(bare_runner(weights)).ledger
    of_decode = [record.bytes for record in ledger if record.kind is StepKind.DECODE]
    assert sum(of_decode) <= len(of_decode) * (2 << 20)
