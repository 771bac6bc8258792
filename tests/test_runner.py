"""Measuring steps on a CPU: what they run on, what it costs, and that nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_infer.graphs.params import Params
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeState
from mini_infer.loader import load_params, read_model_files
from mini_infer.measuring import GREEDY
from mini_infer.runner import MEASURED_PROMPT_TOKENS, MOST_TIMED_RUNS, ModelRunner, give_back_memory
from mini_infer.step import PrefillChunk, SchedulerOutputs, StepKind
from tests.tiny_models import MAX_POSITIONS, make_tiny_model

CPU = torch.device("cpu")
MAX_ROWS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Params]:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model("llama3-gqa", folder, num_hidden_layers=2)
    files = read_model_files(folder)
    return files.spec, load_params(files, dtype=torch.float32, device=CPU, max_positions=MAX_POSITIONS)


@pytest.fixture
def make_runner(model: tuple[ModelSpec, Params]) -> Callable[..., ModelRunner]:
    def make(*, num_gpu_blocks: int = 64, max_model_len: int = 128, windows: tuple[int, int] = (0, 0)) -> ModelRunner:
        spec, params = model
        return ModelRunner(
            replace(spec, sliding_windows=windows),
            params,
            device=CPU,
            dtype=torch.float32,
            num_gpu_blocks=num_gpu_blocks,
            num_cpu_blocks=0,
            block_size=4,
            max_num_seqs=MAX_ROWS,
            max_model_len=max_model_len,
        )

    return make


class RecordedSteps:
    """In place of a runner's steps: what was asked for. A run lasts by its context, on the clock that `_time` reads."""

    def __init__(self, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, *, window: int = 0) -> None:
        self.now = 0.0
        self.window = window
        self.prefills: list[tuple[tuple[PrefillChunk, ...], int]] = []
        self.contexts: list[list[int]] = []
        self._runner = runner
        monkeypatch.setattr("mini_infer.runner.time.perf_counter", lambda: self.now)
        runner._steps = self

    def decode(self, bucket: int) -> Tensor:
        """5 ms, and 0.01 for each token that an active row attends to; like the device, it advances them."""
        rows = self._runner._state.rows(bucket)
        lengths = rows.seq_lens[rows.active.bool()].tolist()
        self.contexts.append(lengths)
        self.now += 5e-3 + 1e-5 * sum(min(length, self.window or length) for length in lengths)
        rows.seq_lens.add_(rows.active)
        return torch.zeros((bucket, 2), dtype=torch.int32)

    def prefill(self, chunks: tuple[PrefillChunk, ...], bucket: int) -> Tensor:
        self.prefills.append((chunks, bucket))
        self.now += 1e-3 * bucket
        return torch.zeros((len(chunks), 2), dtype=torch.int32)


def device_rows(state: DecodeState) -> list[Tensor]:
    rows = state.rows(MAX_ROWS)
    sampling = rows.sampling
    tensors = (rows.token_ids, rows.seq_lens, rows.block_tables, rows.active, sampling.temperature, sampling.top_k)
    return [
        tensor.clone() for tensor in (*tensors, sampling.top_p, sampling.min_p, sampling.seeds, *sampling.penalties)
    ]


@pytest.fixture
def unchanged(make_runner: Callable[..., ModelRunner]) -> Iterator[ModelRunner]:
    """A runner whose rows must be as they were at first when the test is over, on the device and on the host."""
    runner = make_runner()
    yield runner
    fresh = DecodeState(MAX_ROWS, runner._max_blocks, runner._model.spec.vocab_size, CPU)
    for mine, other in zip(device_rows(runner._state), device_rows(fresh), strict=True):
        assert torch.equal(mine, other)
    mirrors = [state._mirror.copy() for state in (runner._state, fresh)]
    for mirror in mirrors:
        mirror[:, 1:3] = 0  # where each row's token comes from, set anew by every edit
    np.testing.assert_array_equal(mirrors[0], mirrors[1])


# Real steps of a tiny model


def test_every_measurement_leaves_the_rows_padded(unchanged: ModelRunner) -> None:
    """Steps run, times come back, no row is left in use."""
    decode = unchanged.measure_decode([1, 4], limit_s=9)
    prefill = unchanged.measure_prefill([16, 200], max_chunks=8, limit_s=9)
    assert list(decode) == [1, 4] and list(prefill) == [16, 200]
    assert min(*decode.values(), *prefill.values()) > 0
    for bucket, max_rows in ((4, 4), (4, 2), (1, 1)):
        assert 0 <= unchanged.measure_context(bucket, max_rows=max_rows, num_tokens=160) < 1


def test_generation_is_the_same_after_measuring(make_runner: Callable[..., ModelRunner]) -> None:
    """What measuring left in the blocks reaches no request."""

    def first_token(runner: ModelRunner) -> tuple[int, float]:
        prompt = tuple(range(5, 16))
        chunk = PrefillChunk("a", 0, prompt, (1, 2, 3), GREEDY, 0, is_last=True)
        outputs = SchedulerOutputs(1, StepKind.PREFILL, 16, ("a",), (chunk,))
        runner.prepare(outputs)
        sampled = runner.execute(outputs).result()
        return int(sampled.token_ids[0]), float(sampled.logprobs[0])

    fresh, measured = make_runner(), make_runner()
    measured._kv.blocks.fill_(float("nan"))  # whoever had them before
    measured._kv.blocks[:, :, 0] = 0.0
    measured.measure_prefill([16, 128], max_chunks=8, limit_s=9)
    measured.measure_context(4, max_rows=4, num_tokens=160)
    assert first_token(measured) == first_token(fresh)


@pytest.mark.parametrize("num_gpu_blocks", [1, 2, 5])
def test_tiny_pools(make_runner: Callable[..., ModelRunner], num_gpu_blocks: int) -> None:
    """As the trial runner has it, for one: prefill falls back to padding, and there is no context to speak of."""
    runner = make_runner(num_gpu_blocks=num_gpu_blocks)
    costs = runner.measure_prefill([1, 300], max_chunks=64, limit_s=9)
    assert list(costs) == [1, 300] and min(costs.values()) > 0
    assert runner.measure_context(4, max_rows=4, num_tokens=160) == 0.0


def test_the_shortest_models(make_runner: Callable[..., ModelRunner]) -> None:
    """A prompt of one token is the longest that leaves a place for its output."""
    runner = make_runner(max_model_len=2)
    assert list(runner.measure_prefill([8], max_chunks=3, limit_s=9)) == [8]
    assert runner.measure_context(4, max_rows=4, num_tokens=160) == 0.0


# What they run on, by a clock of their own


def test_prefill_is_measured_on_whole_prompts(
    make_runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the longest length allowed, over real blocks; the same ones in every run."""
    runner = make_runner(num_gpu_blocks=1000, max_model_len=100)
    steps = RecordedSteps(runner, monkeypatch)
    costs = runner.measure_prefill([8, 250], max_chunks=64, limit_s=9)
    assert costs == {8: pytest.approx(8.0), 250: pytest.approx(250.0)}
    runs = {bucket: [chunks for chunks, asked in steps.prefills if asked == bucket] for bucket in (8, 250)}
    assert [len(chunk.token_ids) for chunk in runs[8][0]] == [8]
    assert [len(chunk.token_ids) for chunk in runs[250][0]] == [99, 99, 52]
    assert all(chunks is runs[250][0] for chunks in runs[250])


def test_measured_prompts_have_a_longest_length(
    make_runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(num_gpu_blocks=1000, max_model_len=4000)
    steps = RecordedSteps(runner, monkeypatch)
    runner.measure_prefill([2500], max_chunks=64, limit_s=0)
    assert [len(chunk.token_ids) for chunk in steps.prefills[0][0]] == [MEASURED_PROMPT_TOKENS] * 2 + [452]
    runner.measure_prefill([2500], max_chunks=1, limit_s=0)
    assert [len(chunk.token_ids) for chunk in steps.prefills[-1][0]] == [MEASURED_PROMPT_TOKENS]


def test_no_more_is_begun_after_the_time(
    make_runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs of the first take 40 ms, those of the second pass 100."""
    runner = make_runner()
    RecordedSteps(runner, monkeypatch)
    assert list(runner.measure_prefill([10, 20, 30, 40], max_chunks=8, limit_s=0.1)) == [10, 20]


def test_context_by_hand(make_runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    """0.01 ms a token; the rows grow while they are timed, by less than is told apart."""
    runner = make_runner(num_gpu_blocks=200)
    steps = RecordedSteps(runner, monkeypatch)
    assert runner.measure_context(4, max_rows=3, num_tokens=300) == pytest.approx(0.01, rel=0.1)
    lengths = [contexts for contexts in steps.contexts if contexts]
    assert lengths[0] == [100, 100, 100] and len(lengths) <= MOST_TIMED_RUNS
    assert not steps.contexts[0], "the step without context comes first"


def test_the_context_of_a_row_has_room_to_grow(
    make_runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is timed, no row runs past its blocks."""
    runner = make_runner(num_gpu_blocks=200, max_model_len=96)
    steps = RecordedSteps(runner, monkeypatch)
    runner.measure_context(4, max_rows=4, num_tokens=4000)
    assert max(length for lengths in steps.contexts for length in lengths) < 96


@pytest.mark.parametrize(("windows", "seen"), [((20, 30), 30), ((20, 0), 0), ((0, 0), 0), ((200, 200), 200)])
def test_context_beyond_every_window_does_not_count(
    make_runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch, windows: tuple[int, int], seen: int
) -> None:
    """With a window in every layer a row's context is at most the longest one; else it is all of it."""
    runner = make_runner(num_gpu_blocks=200, windows=windows)
    RecordedSteps(runner, monkeypatch, window=seen)
    assert runner.measure_context(4, max_rows=4, num_tokens=400) == pytest.approx(0.01, rel=0.1)


def test_context_that_makes_no_difference(
    make_runner: Callable[..., ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times vary: a step with context that took less than one without says nothing."""
    runner = make_runner()
    times = iter([5.0, 4.0])
    monkeypatch.setattr(runner, "_time", lambda run: next(times))
    assert runner.measure_context(4, max_rows=2, num_tokens=100) == 0.0


@pytest.mark.parametrize("used", [False, True])
def test_memory_is_given_back_where_a_gpu_was_used(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    """Where none was, none is woken up for it."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    give_back_memory()
    assert calls == ["empty"] * used
