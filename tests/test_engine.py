"""The engine as its users meet it: what goes in, what comes out, what is refused, and what is left behind: nothing.

Greedy tokens are compared with the Transformers library in tests/e2e; here they are compared with the engine's own
for one prompt alone.
"""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_infer import LLMEngine, SamplingParams
from mini_infer.buckets import BucketUse
from mini_infer.exceptions import (
    ConfigError,
    EngineBusyError,
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    OutOfMemoryError,
    describe,
)
from mini_infer.outputs import GenerateOutput, StreamIncrement
from mini_infer.request import Request, RequestStatus
from mini_infer.runner import ModelRunner, StepHandle
from mini_infer.scheduler import Scheduler
from mini_infer.step import ClearRow, SampledTokens, SchedulerOutputs, StepKind
from tests.tiny_engines import make_tiny_folder, tiny_config
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import CHAT_TEMPLATE, save_tiny_tokenizer

PROMPT = [9, 200, 31, 7, 77]
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"), num_layers=2)


def make_engine(folder: Path, **options: Any) -> LLMEngine:
    return LLMEngine(tiny_config(folder, **{"max_num_seqs": 8, "max_model_len": 192, **options}))


@pytest.fixture(scope="module")
def shared_engine(folder: Path) -> Iterator[LLMEngine]:
    with make_engine(folder) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: LLMEngine) -> Iterator[LLMEngine]:
    """An engine of the usual options, which every test leaves as it found it."""
    yield shared_engine
    assert_idle(shared_engine)


@pytest.fixture
def engine_with(folder: Path) -> Iterator[Callable[..., LLMEngine]]:
    """Makes engines with options of their own; each must be idle at the end."""
    made: list[LLMEngine] = []

    def make(**options: Any) -> LLMEngine:
        made.append(make_engine(folder, **options))
        return made[-1]

    yield make
    for engine in made:
        assert_idle(engine)
        engine.shutdown()


def runner_of(engine: LLMEngine) -> ModelRunner:
    return engine._open().runner


def scheduler_of(engine: LLMEngine) -> Scheduler:
    return engine._open().scheduler


def assert_idle(engine: LLMEngine) -> None:
    """No request, no output, no block is left anywhere."""
    assert engine._loop is not None
    while engine._loop._in_flight:  # surplus steps of sequences that ended
        engine.step()
    stats, scheduler = engine.stats(), scheduler_of(engine)
    assert (stats.num_running, stats.num_prefilling, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0, 0)
    assert not engine.has_unfinished_requests
    assert scheduler.block_manager.num_free_cpu_blocks == scheduler.block_manager.num_cpu_blocks
    scheduler.block_manager.check_integrity()
    for container in (
        engine._loop._left,
        engine._processor._tracked,
        engine._processor._watched,
        engine._processor._outputs,
        scheduler._requests,
        scheduler._places.queue,
        scheduler._places.prefilling,
        scheduler.block_manager._sequences,
    ):
        assert not container


def greedy(max_tokens: int = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **changes})


def prompts_of(count: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 320) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@pytest.fixture(scope="module")
def alone(shared_engine: LLMEngine) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of one prompt with nobody beside it. They are always the same, so they are kept."""
    known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def run(prompt: list[int], max_tokens: int) -> list[int]:
        key = tuple(prompt), max_tokens
        if key not in known:
            known[key] = shared_engine.generate([prompt], sampling_params=greedy(max_tokens))[0].token_ids
        return list(known[key])

    return run


def fetch(engine: LLMEngine, request_id: str, most_calls: int = 2000) -> GenerateOutput:
    """Poll for one output, within a bound."""
    for _ in range(most_calls):
        output = engine.get_output(request_id)
        if output is not None:
            return output
    raise AssertionError(f"{request_id} did not finish within {most_calls} calls")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[LLMEngine, list[int]], None]:
    """script(engine, tokens): every request of ``engine`` "samples" these tokens, then token 3 for ever."""

    def install(engine: LLMEngine, tokens: list[int]) -> None:
        launched: dict[str, int] = {}

        class Scripted:
            span = None

            def __init__(self, outputs: SchedulerOutputs) -> None:
                self.token_ids = []
                finals = {chunk.request_id: chunk.is_last for chunk in outputs.chunks}
                for request_id in outputs.request_ids:
                    index = launched.setdefault(request_id, 0)
                    self.token_ids.append(tokens[index] if index < len(tokens) else 3)
                    launched[request_id] += finals.get(request_id, True)

            def result(self) -> SampledTokens:
                count = len(self.token_ids)
                return SampledTokens(np.array(self.token_ids, dtype=np.int32), np.full(count, -1.0, dtype=np.float32))

        monkeypatch.setattr(runner_of(engine), "execute", Scripted)

    return install


def encode(engine: LLMEngine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode(text)


# generate


def test_prompts_of_every_kind(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """A text, token ids, one or many, mixed and of any length: one output each, in the order of the prompts."""
    texts = ["hello there", "a", "the cat sat on the mat " * 4]
    ids = prompts_of(4)
    mixed: list[Any] = [texts[0], ids[0], texts[1], ids[1], ids[2], texts[2], tuple(ids[3])]
    expected_ids = [encode(engine, prompt) if isinstance(prompt, str) else list(prompt) for prompt in mixed]
    outputs = engine.generate(mixed, sampling_params=greedy(9))
    assert [output.prompt_token_ids for output in outputs] == expected_ids
    assert [output.token_ids for output in outputs] == [alone(prompt, 9) for prompt in expected_ids]
    for prompt, expected in zip((texts[0], ids[0], tuple(ids[0])), (0, 1, 1), strict=True):
        single = engine.generate(prompt, sampling_params=greedy(9))
        assert [output.token_ids for output in single] == [outputs[expected].token_ids]
    assert engine.generate([]) == []


def test_more_prompts_than_rows(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """Short ones overtake long ones inside; outside the order stays."""
    prompts = prompts_of(30, seed=1)
    params = [greedy(1 + (7 * index) % 23) for index in range(30)]
    outputs = engine.generate(prompts, sampling_params=params)
    for prompt, wanted, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.token_ids == alone(prompt, wanted.max_tokens)


def test_output_fields(engine: LLMEngine) -> None:
    """What the contract names, and what comes on top, hang together."""
    output = engine.generate([PROMPT], sampling_params=greedy(10))[0]
    assert engine.tokenizer is not None
    assert output.text == engine.tokenizer.decode(output.token_ids)
    assert output.finish_reason == "length"
    assert output.error is None
    assert math.isfinite(output.cumulative_logprob)
    assert output.cumulative_logprob < 0
    timings = output.timings
    assert timings.first_token is not None
    assert timings.queued < timings.first_token < timings.finished
    assert timings.ttft == timings.first_token - timings.queued
    assert timings.latency == timings.finished - timings.queued


def test_explicit_arguments_win(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """Over the fields of sampling_params, for one and for a list; the fields not named stay."""
    wild = SamplingParams(temperature=5.0, max_tokens=30, ignore_eos=True, seed=1)
    expected = alone(PROMPT, 6)
    assert engine.generate([PROMPT], 6, 0.0, sampling_params=wild)[0].token_ids == expected
    assert engine.generate([PROMPT], max_tokens=6, top_k=1, sampling_params=[wild])[0].token_ids == expected
    assert engine.generate([PROMPT], max_tokens=6, top_p=1e-6, sampling_params=wild)[0].token_ids == expected
    assert wild.max_tokens == 30
    untouched = engine.generate([PROMPT], sampling_params=wild)[0].token_ids
    assert len(untouched) == 30
    assert untouched[:6] != expected


def test_default_lengths(engine: LLMEngine, script: Callable[..., None]) -> None:
    """100 tokens for generate and stream, 16 for add_request and for SamplingParams."""
    script(engine, [])
    assert len(engine.generate([PROMPT])[0].token_ids) == 100
    assert [*engine.stream(PROMPT)][-1].output.token_ids == [3] * 100  # type: ignore[union-attr]
    assert len(engine.chat(MESSAGES).token_ids) == 100
    assert len(fetch(engine, engine.add_request(PROMPT)).token_ids) == 16
    assert len(engine.generate([PROMPT], sampling_params=SamplingParams())[0].token_ids) == 16
    assert len(fetch(engine, engine.add_request(PROMPT, 5, SamplingParams(max_tokens=9))).token_ids) == 5


def test_zero_temperature_is_greedy(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """Whatever the other sampling fields say, and whatever the seed."""
    params = [greedy(15, seed=seed, top_k=3, top_p=0.5, min_p=0.2) for seed in range(3)]
    outputs = engine.generate([PROMPT] * 3, sampling_params=params)
    assert [output.token_ids for output in outputs] == [alone(PROMPT, 15)] * 3


@pytest.mark.parametrize("progress", [True, False])
def test_no_progress_bar_without_a_terminal(
    engine_with: Callable[..., LLMEngine], capfd: pytest.CaptureFixture[str], progress: bool
) -> None:
    """Neither while loading nor while generating: logs of servers stay clean."""
    engine_with(progress=progress).generate(prompts_of(3), max_tokens=3)
    assert capfd.readouterr() == ("", "")


# Ends


def test_max_model_len_cuts(engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]) -> None:
    """Prompt and output together stay within it: the rest of max_tokens is cut, and that is a "length"."""
    engine = engine_with(max_model_len=64)
    prompt = prompts_of(1, seed=2)[0][:1] * 60
    output = engine.generate([prompt], sampling_params=greedy(50))[0]
    assert output.finish_reason == "length"
    assert output.token_ids == alone(prompt, 4)
    assert len(engine.generate([[*prompt, 5, 6, 7]], sampling_params=greedy(50))[0].token_ids) == 1


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_end_of_sequence(folder: Path, tmp_path: Path, alone: Callable[..., list[int]], place: str) -> None:
    """The model's own end token ends the text with "stop", is among the tokens and not in the text; ignored on
    request."""
    expected = alone(PROMPT, 12)
    index = next(i for i in range(3, 12) if expected[i] not in expected[:i])
    shutil.copytree(folder, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "eos_token_id": expected[index] if name == place else 2}))
    with make_engine(tmp_path / "model") as engine:
        assert engine.tokenizer is not None
        first, second = engine.generate([PROMPT] * 2, sampling_params=[greedy(12, ignore_eos=False), greedy(12)])
        assert first.finish_reason == "stop"
        assert first.token_ids == expected[: index + 1]
        assert first.text == engine.tokenizer.decode(expected[:index])
        assert second.finish_reason == "length"
        assert second.token_ids == expected
        assert_idle(engine)


@pytest.mark.parametrize("eos", [None, 60])
def test_the_tokenizers_end_token(folder: Path, tmp_path: Path, script: Callable[..., None], eos: int | None) -> None:
    """A model whose configs name none, or another one only, ends at its tokenizer's as well."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": eos}))
    with make_engine(tmp_path / "model") as engine:
        script(engine, [50, 51, 1, 52])
        assert engine.generate([PROMPT], max_tokens=9)[0].token_ids == [50, 51, 1]


def test_stop_token_ids(engine: LLMEngine, script: Callable[..., None]) -> None:
    """As the end token, for one request; they work beside ignore_eos."""
    script(engine, [50, 51, 1, 52, 53, 54])
    outputs = engine.generate(
        [PROMPT] * 4,
        sampling_params=[
            greedy(9, stop_token_ids=[53, 60]),
            greedy(9, stop_token_ids=(53,), ignore_eos=False),
            greedy(4, stop_token_ids={52}),
            greedy(9, stop_token_ids=[50]),
        ],
    )
    assert [output.token_ids for output in outputs] == [[50, 51, 1, 52, 53], [50, 51, 1], [50, 51, 1, 52], [50]]
    assert [output.finish_reason for output in outputs] == ["stop"] * 4
    assert outputs[3].text == ""


TEXT = "Grüße, the end of ages. More text follows"


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("the end",), "Grüße, "),
        ("the end", "Grüße, "),
        ((" of ages", "the end of"), "Grüße, "),
        (("ße",), "Grü"),
        (("G",), ""),
        ((". M",), "Grüße, the end of ages"),
        (("not there", "end "), "Grüße, the "),
    ],
)
def test_stop_strings(engine: LLMEngine, script: Callable[..., None], stop: Any, expected: str) -> None:
    """Across tokens and within them, wherever the tokenizer cuts: cut before it, "stop", streamed or not."""
    tokens = encode(engine, TEXT)
    assert len(tokens) > 25
    script(engine, tokens)
    params = greedy(60, stop=stop)
    output = engine.generate([PROMPT], sampling_params=params)[0]
    assert (output.text, output.finish_reason) == (expected, "stop")
    assert output.token_ids == tokens[: len(output.token_ids)]
    increments = [*engine.stream(PROMPT, sampling_params=params)]
    assert "".join(increment.text for increment in increments) == expected
    assert increments[-1].output is not None
    assert increments[-1].output.token_ids == output.token_ids


def test_a_stop_string_ends_at_its_own_token(engine: LLMEngine, script: Callable[..., None]) -> None:
    """No token more is generated than it takes to see the string."""
    tokens = encode(engine, TEXT)
    script(engine, tokens)
    output = engine.generate([PROMPT], sampling_params=greedy(60, stop="end"))[0]
    assert engine.tokenizer is not None
    assert "end" in engine.tokenizer.decode(output.token_ids)
    assert "end" not in engine.tokenizer.decode(output.token_ids[:-1])


def test_a_stop_string_with_the_last_token(engine: LLMEngine, script: Callable[..., None]) -> None:
    """Completed by the very last token that max_tokens allows: still a "stop"; one token less: a "length" with the
    begun stop string in the text."""
    tokens = encode(engine, "abc XYZ def")
    script(engine, tokens)
    assert engine.tokenizer is not None
    needed = next(n for n in range(len(tokens)) if "XYZ" in engine.tokenizer.decode(tokens[:n]))
    first, second = engine.generate(
        [PROMPT] * 2, sampling_params=[greedy(needed, stop="XYZ"), greedy(needed - 1, stop="XYZ")]
    )
    assert (first.text, first.finish_reason) == ("abc ", "stop")
    assert (second.text, second.finish_reason) == (engine.tokenizer.decode(tokens[: needed - 1]), "length")
    assert second.text.startswith("abc X")


def test_stop_strings_with_steps_ahead(engine_with: Callable[..., LLMEngine], script: Callable[..., None]) -> None:
    """Steps that were launched before the stop string was seen are dropped: tokens, text and blocks."""
    engine = engine_with(steps_in_flight=3)
    tokens = encode(engine, TEXT)
    script(engine, tokens)
    outputs = engine.generate(
        [PROMPT] * 3, sampling_params=[greedy(60, stop="end"), greedy(60, stop="ages"), greedy(7)]
    )
    assert [output.text for output in outputs[:2]] == ["Grüße, the ", "Grüße, the end of "]
    for output in outputs:
        assert output.token_ids == tokens[: len(output.token_ids)]
    assert len(outputs[2].token_ids) == 7


# Polling


def test_polling_alone_is_enough(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """The contract's loop: add_request, then get_output until all are there, never step()."""
    prompts = prompts_of(20, seed=3)
    ids = {engine.add_request(prompt, sampling_params=greedy(8)): prompt for prompt in prompts}
    assert len(ids) == 20
    found: dict[str, GenerateOutput] = {}
    calls = 0
    waiting = list(ids)
    while waiting:
        for request_id in waiting[:]:
            output = engine.get_output(request_id)
            calls += 1
            if output:
                found[request_id] = output
                waiting.remove(request_id)
    assert calls < 400
    for request_id, prompt in ids.items():
        assert found[request_id].request_id == request_id
        assert found[request_id].token_ids == alone(prompt, 8)


def test_a_call_is_one_step(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """get_output of an unfinished request runs exactly one step, of a finished one none."""
    steps: list[SchedulerOutputs] = []
    execute = runner_of(engine).execute
    monkeypatch.setattr(runner_of(engine), "execute", lambda outputs: (steps.append(outputs), execute(outputs))[1])
    first, second = (engine.add_request(PROMPT, sampling_params=greedy(4)) for _ in range(2))
    for count in range(1, 4):
        assert engine.get_output(first) is None
        assert len(steps) == count
    assert engine.get_output(first) is not None
    assert len(steps) == 4
    assert engine.get_output(second) is not None  # finished in the same step
    assert len(steps) == 4


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_polling_any_one_moves_all(engine_with: Callable[..., LLMEngine], steps_in_flight: int) -> None:
    """Whoever polls the last request drives the others to their ends too."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    ids = [engine.add_request(prompt, sampling_params=greedy(5)) for prompt in prompts_of(12)]
    fetch(engine, ids[-1], most_calls=60)
    for request_id in ids[:-1]:
        assert engine.get_output(request_id) is not None


def test_get_output_of_no_request(engine: LLMEngine) -> None:
    """Unknown, or fetched already: an error, so that a polling loop cannot wait for ever."""
    for request_id in ("nonsense", "", "request-99999999"):
        with pytest.raises(InvalidRequestError, match="no request"):
            engine.get_output(request_id)
    for wrong in (None, 7, [], {}):
        for method in (engine.get_output, engine.abort):
            with pytest.raises(InvalidRequestError, match="a request's id is a string, got "):
                method(wrong)  # type: ignore[operator]
    request_id = engine.add_request(PROMPT, max_tokens=1)
    fetch(engine, request_id)
    with pytest.raises(InvalidRequestError, match=f"{request_id}.*fetched already"):
        engine.get_output(request_id)


def test_an_empty_text_is_an_output(engine: LLMEngine, script: Callable[..., None]) -> None:
    """`if output:` means "it is ready", even when nothing was said."""
    script(engine, [1])
    output = fetch(engine, engine.add_request(PROMPT))
    assert output.text == ""
    assert bool(output)


def test_step_returns_what_ended(engine: LLMEngine) -> None:
    """For those who drive the engine themselves; get_output still gives it, once."""
    request_id = engine.add_request(PROMPT, sampling_params=greedy(3))
    assert engine.has_unfinished_requests
    assert [engine.step(), engine.step()] == [[], []]
    (output,) = engine.step()
    assert output.request_id == request_id
    assert not engine.has_unfinished_requests
    assert engine.step() == []
    assert engine.get_output(request_id) is output


def test_ids_are_unique(engine: LLMEngine) -> None:
    """Over generate, stream and add_request, and after ends."""
    ids = [output.request_id for output in engine.generate([PROMPT] * 3, max_tokens=1)]
    ids += [[*engine.stream(PROMPT, max_tokens=1)][-1].request_id]
    ids += [engine.add_request(PROMPT, max_tokens=1) for _ in range(3)]
    for request_id in ids[-3:]:
        fetch(engine, request_id)
    assert len(set(ids)) == 7
    assert all(isinstance(request_id, str) for request_id in ids)


def test_generate_beside_queued_requests(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """generate leaves other people's requests and outputs alone."""
    prompts = prompts_of(3, seed=5)
    short = engine.add_request(prompts[0], sampling_params=greedy(2))
    long = engine.add_request(prompts[1], sampling_params=greedy(40))
    output = engine.generate([prompts[2]], sampling_params=greedy(10))[0]
    assert output.token_ids == alone(prompts[2], 10)
    for request_id, prompt, count in ((short, prompts[0], 2), (long, prompts[1], 40)):
        assert fetch(engine, request_id).token_ids == alone(prompt, count)


# Streams


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_stream(engine_with: Callable[..., LLMEngine], steps_in_flight: int) -> None:
    """Increments join to the output, texts and tokens; the last one, and only it, carries the output."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    for prompt in ("hello", PROMPT, prompts_of(1, seed=6)[0]):
        expected = engine.generate([prompt], sampling_params=greedy(30))[0]
        increments = [*engine.stream(prompt, sampling_params=greedy(30))]
        output = increments[-1].output
        assert output is not None
        assert [increment.finished for increment in increments] == [False] * (len(increments) - 1) + [True]
        assert "".join(increment.text for increment in increments) == output.text == expected.text
        joined = [token_id for increment in increments for token_id in increment.token_ids]
        assert joined == output.token_ids == expected.token_ids
        assert len({increment.request_id for increment in increments}) == 1
        assert len(increments) >= 25


def test_stream_of_characters(engine: LLMEngine, script: Callable[..., None]) -> None:
    """Characters of several tokens come whole; bytes that never become one come at the end, as in the output."""
    tokens = encode(engine, "né 你好 🎉!")
    broken = [*encode(engine, "ab"), encode(engine, "🎉")[0]]
    for script_tokens in (tokens, broken):
        script(engine, script_tokens)
        increments = [*engine.stream(PROMPT, sampling_params=greedy(len(script_tokens)))]
        assert not any("\ufffd" in increment.text for increment in increments[:-1])
        assert "".join(increment.text for increment in increments) == engine.tokenizer.decode(script_tokens)  # type: ignore[union-attr]


def test_leaving_a_stream(engine: LLMEngine) -> None:
    """By break, by an exception in the loop, by close(): the request is aborted and its blocks come back at once."""

    def leave_by_break() -> None:
        for _ in engine.stream(PROMPT, sampling_params=greedy(100)):
            break

    def leave_by_error() -> None:
        with pytest.raises(ZeroDivisionError):
            for _ in engine.stream(PROMPT, sampling_params=greedy(100)):
                raise ZeroDivisionError

    def leave_by_close() -> None:
        with closing(engine.stream(PROMPT, sampling_params=greedy(100))) as stream:  # type: ignore[type-var]
            next(stream)
            next(stream)
            assert engine.stats().num_running == 1

    for leave in (leave_by_break, leave_by_error, leave_by_close):
        leave()
        gc.collect()
        assert_idle(engine)


def test_a_stream_nobody_reads_queues_nothing(engine: LLMEngine) -> None:
    """Nothing is held for an iterator that is dropped before its first increment."""
    engine.stream(PROMPT, max_tokens=5)
    assert not engine.has_unfinished_requests


def test_a_stream_is_checked_at_the_call(engine: LLMEngine) -> None:
    """Not at the first increment, which may be read somewhere else."""
    for prompt in ([], "", [320], b"x", [1] * 500):
        with pytest.raises(InvalidRequestError):
            engine.stream(prompt)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        engine.stream(PROMPT, max_tokens=0)
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        engine.stream(PROMPT, sampling_params={"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="non-empty list of turns"):
        engine.stream_chat([])


def test_streams_side_by_side(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """Two streams read in turns, with a generate in between: each gets its own."""
    prompts = prompts_of(3, seed=8)
    streams = [engine.stream(prompt, sampling_params=greedy(20)) for prompt in prompts[:2]]
    tokens: list[list[int]] = [[], []]
    for turn in range(6):  # each turn takes two steps, and every step moves both
        for index, stream in enumerate(streams):
            tokens[index] += next(stream).token_ids
        if turn == 2:
            output = engine.generate([prompts[2]], sampling_params=greedy(4))[0]
            assert output.token_ids == alone(prompts[2], 4)
    for index, stream in enumerate(streams):
        for increment in stream:
            tokens[index] += increment.token_ids
        assert tokens[index] == alone(prompts[index], 20)


@pytest.mark.parametrize("way", ["abort", "get_output"])
def test_a_stream_whose_request_is_taken(engine: LLMEngine, way: str) -> None:
    """Aborted or fetched by its id, inside the loop: the stream ends."""
    seen = 0
    for increment in engine.stream(PROMPT, sampling_params=greedy(20)):
        seen += 1
        if way == "abort":
            assert engine.abort(increment.request_id).finish_reason == "abort"
        else:
            assert fetch(engine, increment.request_id).finish_reason == "length"
    assert seen == 1


# Chat


def test_chat_uses_the_template(engine: LLMEngine) -> None:
    """The prompt is the template's rendering, the same streamed or not."""
    assert engine.has_chat_template
    rendered = engine.tokenizer.apply_chat_template(MESSAGES)  # type: ignore[union-attr]
    assert engine.tokenizer.decode(rendered, skip_special_tokens=False) == (  # type: ignore[union-attr]
        "<s>system: be brief</s><s>user: hello</s><s>assistant: "
    )
    output = engine.chat(MESSAGES, 12, greedy(99))
    assert output.prompt_token_ids == rendered
    assert output.token_ids == engine.generate([rendered], sampling_params=greedy(12))[0].token_ids
    increments = [*engine.stream_chat(MESSAGES, 12, greedy(99))]
    assert increments[-1].output is not None
    assert increments[-1].output.prompt_token_ids == rendered
    assert "".join(increment.text for increment in increments) == output.text


@pytest.mark.parametrize(
    "messages", [[], "hi", {"role": "user", "content": "x"}, [{"role": "user"}], ["hi"], [{"role": 1, "content": "x"}],
                 [{"role": "user", "content": "half a pair: \ud83d"}], [{"role": "\ud83d", "content": "x"}], None]
)  # fmt: skip
def test_bad_messages(engine: LLMEngine, messages: Any) -> None:
    for method in (engine.chat, engine.stream_chat):
        with pytest.raises(InvalidRequestError):
            method(messages)


def test_no_chat_template(folder: Path, tmp_path: Path) -> None:
    """Refused with what to use instead; plain prompts work."""
    shutil.copytree(folder, tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model", chat_template=None)
    with make_engine(tmp_path / "model") as engine:
        assert not engine.has_chat_template
        for method in (engine.chat, engine.stream_chat):
            with pytest.raises(InvalidRequestError, match="no chat template: use generate or stream"):
                method(MESSAGES)
        assert engine.generate("hello", max_tokens=1)


def test_a_template_that_refuses(folder: Path, tmp_path: Path) -> None:
    """The model's own words are in the error."""
    shutil.copytree(folder, tmp_path / "model")
    save_tiny_tokenizer(
        tmp_path / "model", chat_template="{{ raise_exception('roles must alternate') }}" + CHAT_TEMPLATE
    )
    with make_engine(tmp_path / "model") as engine, pytest.raises(InvalidRequestError, match="roles must alternate"):
        engine.chat(MESSAGES)


# Abort


def status(engine: LLMEngine, request_id: str) -> RequestStatus:
    return scheduler_of(engine)._requests[request_id].status


def check_partial(engine: LLMEngine, output: GenerateOutput, expected: list[int]) -> None:
    """What an aborted request had, to the token; and asking again is an error."""
    assert output.finish_reason == "abort"
    assert output.token_ids == expected
    assert output.text == engine.tokenizer.decode(expected)  # type: ignore[union-attr]
    with pytest.raises(InvalidRequestError, match="no request"):
        engine.abort(output.request_id)
    with pytest.raises(InvalidRequestError, match="no request"):
        engine.get_output(output.request_id)


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_abort_in_every_state(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], steps_in_flight: int
) -> None:
    """Waiting, prefilling, running, draining, finished: the partial output, no block left, others unharmed."""
    engine = engine_with(steps_in_flight=steps_in_flight, max_prefill_tokens=16, max_num_seqs=3)
    other_prompt = prompts_of(1, seed=9)[0]
    other = engine.add_request(other_prompt, sampling_params=greedy(60))
    long_prompt = PROMPT * 10

    waiting = engine.add_request(PROMPT)
    assert status(engine, waiting) is RequestStatus.WAITING
    check_partial(engine, engine.abort(waiting), [])

    prefilling = engine.add_request(long_prompt)
    while status(engine, prefilling) is not RequestStatus.PREFILLING:
        engine.step()
    check_partial(engine, engine.abort(prefilling), [])

    running = engine.add_request(PROMPT, sampling_params=greedy(50))
    while len(scheduler_of(engine)._requests[running].output_token_ids) < 4:
        engine.step()
    assert status(engine, running) is RequestStatus.RUNNING
    check_partial(engine, engine.abort(running), alone(PROMPT, 4))

    if steps_in_flight > 1:
        draining = engine.add_request(PROMPT, sampling_params=greedy(2))
        while status(engine, draining) is not RequestStatus.DRAINING:
            engine.step()
        output = engine.abort(draining)
        check_partial(engine, output, alone(PROMPT, 2)[: len(output.token_ids)])

    finished = engine.add_request(PROMPT, sampling_params=greedy(2))
    while engine._processor.__contains__(finished):
        engine.step()
    output = engine.abort(finished)
    assert (output.finish_reason, output.token_ids) == ("length", alone(PROMPT, 2))
    with pytest.raises(InvalidRequestError):
        engine.abort(finished)

    assert fetch(engine, other).token_ids == alone(other_prompt, 60)


def test_abort_a_swapped_request(engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]) -> None:
    """Its CPU blocks come back too (`assert_idle` counts them)."""
    engine = engine_with(
        block_size=4, num_gpu_blocks=20, num_cpu_blocks=40, preemption="swap", max_model_len=64, prefill_share=1.0
    )
    prompts = prompts_of(4, seed=10, longest=12)
    ids = [engine.add_request(prompt, sampling_params=greedy(40)) for prompt in prompts]
    swapped: list[str] = []
    while not swapped:
        engine.step()
        swapped = [i for i in ids if i in engine._processor and status(engine, i) is RequestStatus.SWAPPED]
    victim = swapped[0]
    prompt = prompts[ids.index(victim)]
    partial = list(scheduler_of(engine)._requests[victim].output_token_ids)
    assert partial
    check_partial(engine, engine.abort(victim), alone(prompt, len(partial)))
    for request_id, prompt in zip(ids, prompts, strict=True):
        if request_id != victim:
            assert fetch(engine, request_id).token_ids == alone(prompt, 40)


def test_abort_of_no_request(engine: LLMEngine) -> None:
    for request_id in ("nonsense", ""):
        with pytest.raises(InvalidRequestError, match="no request"):
            engine.abort(request_id)  # type: ignore[arg-type]


def test_abort_at_random(engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]) -> None:
    """With steps ahead, chunks, preemption and swapping: whoever is not aborted gets the right tokens, and whoever is
    gets a beginning of them."""
    draw = random.Random(0)
    for options in ({"preemption": "swap", "num_cpu_blocks": 30}, {"preemption": "recompute"}):
        engine = engine_with(
            steps_in_flight=3,
            block_size=4,
            num_gpu_blocks=24,
            max_model_len=64,
            max_prefill_tokens=16,
            prefill_share=1.0,
            **options,
        )
        prompts = prompts_of(40, seed=11, longest=20)
        lengths = [draw.randint(1, 30) for _ in prompts]
        ids = [
            engine.add_request(prompt, sampling_params=greedy(length))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        outputs: dict[str, GenerateOutput] = {}
        while len(outputs) < len(ids):
            left = [request_id for request_id in ids if request_id not in outputs]
            chosen = draw.choice(left)
            if draw.random() < 0.05:
                outputs[chosen] = engine.abort(chosen)
            elif (output := engine.get_output(chosen)) is not None:
                outputs[chosen] = output
        assert sum(engine.stats().preemptions.values()) > 0
        reasons = {"abort": 0, "length": 0}
        for request_id, prompt, length in zip(ids, prompts, lengths, strict=True):
            output = outputs[request_id]
            reasons[output.finish_reason] += 1
            expected = alone(prompt, length)
            assert output.token_ids == expected[: len(output.token_ids)]
            assert output.finish_reason == "abort" or output.token_ids == expected
        assert min(reasons.values()) > 3


# Refusals


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "empty"),
    ([], "empty"),
    ([5] * 192, "192 tokens, but max_model_len=192 allows at most 191"),
    ("ab " * 300, "max_model_len=192 allows at most 191"),
    ([320], "between 0 and 319.*got 320"),
    ([5, -1], "between 0 and 319.*got -1"),
    ([1.5], "integers, got 1.5"),
    ([True], "integers, got True"),
    ([5, None], "integers, got None"),
    (b"text", "string or a list of token ids"),
    (None, "string or a list of token ids"),
    (7, "string or a list of token ids"),
    ({"prompt": "x"}, "string or a list of token ids"),
    ("half a pair: \ud83d", "cannot be encoded"),
]


@pytest.mark.parametrize("prompt, message", BAD_PROMPTS, ids=[repr(prompt)[:20] for prompt, _ in BAD_PROMPTS])
def test_bad_prompts(engine: LLMEngine, prompt: Any, message: str) -> None:
    """Named with the value and the bound, alone and in the middle of a batch, of which then nothing is queued."""
    running = engine.add_request(PROMPT, sampling_params=greedy(3))
    for call in (engine.add_request, engine.stream, lambda bad: engine.generate([PROMPT, bad, "hello"])):
        with pytest.raises(InvalidRequestError, match=message):
            call(prompt)
    assert engine.stats().num_waiting == 1
    assert fetch(engine, running).finish_reason == "length"


def test_bad_batches(engine: LLMEngine) -> None:
    """generate itself is given something that is no prompt and no list of prompts."""
    for prompts in (None, 7, b"bytes", {"a": 1}, iter(["a"]), [5, "a"], ["a", 5]):
        with pytest.raises(InvalidRequestError):
            engine.generate(prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": "9"}, "max_tokens must be an integer"),
        ({"temperature": -0.1}, "temperature .*-0.1"),
        ({"temperature": float("nan")}, "temperature .*nan"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.1}, "top_p .*1.1"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"sampling_params": [SamplingParams()]}, "2 prompts, but 1 sampling_params"),
        ({"sampling_params": []}, "2 prompts, but 0 sampling_params"),
        ({"sampling_params": 5}, "sampling_params must be"),
        ({"sampling_params": "ab"}, "sampling_params must be"),
        ({"sampling_params": [SamplingParams(), None]}, "sampling_params must be"),
        ({"sampling_params": {"temperature": 0, "seed": 1}}, "sampling_params must be"),
        ({"sampling_params": {SamplingParams()}}, "sampling_params must be"),
    ],
    ids=str,
)
def test_bad_parameters(engine: LLMEngine, options: dict[str, Any], message: str) -> None:
    """Refused before anything is queued."""
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate([PROMPT, PROMPT], **options)
    assert not engine.has_unfinished_requests


def test_a_tokenizer_with_more_tokens_than_the_model(folder: Path, tmp_path: Path) -> None:
    """Another model's tokenizer: ids that the model has no row for are refused, not looked up."""
    make_tiny_model("llama3-gqa", tmp_path, vocab_size=100, num_hidden_layers=1)
    with make_engine(tmp_path, tokenizer=str(folder)) as engine:
        fits = "!!!"
        assert max(encode(engine, fits)) < 100 < max(encode(engine, "the end"))
        with pytest.raises(InvalidRequestError, match="between 0 and 99"):
            engine.generate([fits, "the end"])
        assert engine.generate([fits], max_tokens=2)
        assert_idle(engine)


def test_too_small_a_pool(folder: Path) -> None:
    """Said when the engine is made, with the ways out, not when a long request comes."""
    with pytest.raises(OutOfMemoryError, match=r"max_model_len=192.*takes 12 blocks; there are 11.*at most 176 fits"):
        make_engine(folder, num_gpu_blocks=11)


# Failing steps


class Failing:
    """A method that raises once, at the first step that ``condition`` picks."""

    def __init__(self, method: Callable[[SchedulerOutputs], Any], error: BaseException, condition: Any) -> None:
        self.method, self.error, self.condition = method, error, condition
        self.failed: SchedulerOutputs | None = None

    def __call__(self, outputs: SchedulerOutputs) -> Any:
        if self.failed is None and self.condition(outputs):
            self.failed = outputs
            raise self.error
        return self.method(outputs)


def make_fail(
    monkeypatch: pytest.MonkeyPatch,
    engine: LLMEngine,
    name: str,
    condition: Callable[[SchedulerOutputs], bool],
    error: BaseException | None = None,
) -> Failing:
    failing = Failing(getattr(runner_of(engine), name), error or RuntimeError("the device is on fire"), condition)
    monkeypatch.setattr(runner_of(engine), name, failing)
    return failing


def run_all(engine: LLMEngine, prompts: list[list[int]], lengths: list[int]) -> list[GenerateOutput]:
    ids = [
        engine.add_request(prompt, sampling_params=greedy(length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return [fetch(engine, request_id) for request_id in ids]


def check_survivors(
    outputs: list[GenerateOutput], prompts: list[list[int]], lengths: list[int], alone: Callable[..., list[int]]
) -> None:
    """Every request either failed with the step's error, with a right beginning, or is right to the end."""
    for output, prompt, length in zip(outputs, prompts, lengths, strict=True):
        expected = alone(prompt, length)
        assert output.token_ids == expected[: len(output.token_ids)]
        if output.finish_reason == "error":
            assert output.error == "RuntimeError: the device is on fire"
        else:
            assert output.finish_reason == "length"
            assert output.error is None
            assert output.token_ids == expected
    reasons = {output.finish_reason for output in outputs}
    assert reasons == {"error", "length"}


@pytest.mark.parametrize("steps_in_flight", [1, 3])
@pytest.mark.parametrize("kind", [StepKind.PREFILL, StepKind.DECODE])
def test_a_step_that_cannot_be_launched(
    engine_with: Callable[..., LLMEngine],
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    kind: StepKind,
    steps_in_flight: int,
) -> None:
    """Its requests end with "error" and its message; the others go on, and so does the engine."""
    engine = engine_with(steps_in_flight=steps_in_flight, max_num_seqs=3, max_prefill_tokens=32, block_size=4)
    failing = make_fail(monkeypatch, engine, "execute", lambda outputs: outputs.step > 5 and outputs.kind is kind)
    prompts, lengths = prompts_of(10, seed=12), [3 + (5 * i) % 14 for i in range(10)]
    outputs = run_all(engine, prompts, lengths)
    assert failing.failed is not None
    check_survivors(outputs, prompts, lengths, alone)
    assert {o.request_id for o in outputs if o.finish_reason == "error"} == set(failing.failed.request_ids)
    assert engine.stats().num_finished == 10


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_a_step_whose_tokens_do_not_come(
    engine_with: Callable[..., LLMEngine],
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    steps_in_flight: int,
) -> None:
    """The same when the error shows only when the tokens are read back, steps later."""
    engine = engine_with(steps_in_flight=steps_in_flight, max_num_seqs=3, block_size=4)
    result = StepHandle.result
    calls = 0

    def fail_once(handle: StepHandle) -> SampledTokens:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise RuntimeError("the device is on fire")
        return result(handle)

    monkeypatch.setattr(StepHandle, "result", fail_once)
    prompts, lengths = prompts_of(10, seed=13), [3 + (5 * i) % 14 for i in range(10)]
    outputs = run_all(engine, prompts, lengths)
    monkeypatch.undo()
    check_survivors(outputs, prompts, lengths, alone)


def test_a_swap_that_fails(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever's blocks were to be copied must not go on from what lies in the CPU blocks instead."""
    engine = engine_with(
        block_size=4, num_gpu_blocks=16, num_cpu_blocks=40, preemption="swap", max_model_len=64, prefill_share=1.0,
        enable_prefix_caching=False,
    )  # fmt: skip
    failing = make_fail(monkeypatch, engine, "prepare", lambda outputs: outputs.step > 9 and bool(outputs.swap_out))
    prompts, lengths = prompts_of(12, seed=14, longest=10), [5 + (7 * i) % 22 for i in range(12)]
    outputs = run_all(engine, prompts, lengths)
    assert failing.failed is not None
    check_survivors(outputs, prompts, lengths, alone)
    assert engine.stats().preemptions["swap"] > 1


def test_edits_that_are_lost(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a request that ended must not go on decoding, into blocks that others have by then."""
    engine = engine_with(block_size=4, decode_buckets=[8], enable_prefix_caching=False)
    failing = make_fail(
        monkeypatch, engine, "prepare", lambda outputs: any(isinstance(edit, ClearRow) for edit in outputs.edits)
    )
    first = run_all(engine, prompts_of(3, seed=15), [3, 20, 20])
    assert failing.failed is not None
    assert [output.finish_reason for output in first] == ["length", "error", "error"]
    later = prompts_of(2, seed=18)
    ids = [engine.add_request(prompt, sampling_params=greedy(30)) for prompt in later]
    for _ in range(5):
        engine.step()
    rows = runner_of(engine)._state.rows(8)
    assert rows.active.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert not rows.block_tables[2:].any()
    for request_id, prompt in zip(ids, later, strict=True):
        assert fetch(engine, request_id).token_ids == alone(prompt, 30)


# NaN


def poison(engine: LLMEngine, token_id: int) -> None:
    """The embedding of one token is NaN from now on: whoever reads it has no distribution."""
    runner_of(engine)._model.params.embedding[token_id] = float("nan")


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_nan_ends_its_request_only(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]], steps_in_flight: int
) -> None:
    """In a batch, packed into one prefill step: the neighbours' tokens are as if it had not been there."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    prompts = [prompt for prompt in prompts_of(9, seed=16) if 5 not in prompt and 5 not in alone(prompt, 10)]
    assert len(prompts) > 4
    poison(engine, 5)
    prompts.insert(2, [9, 5, 9])
    outputs = engine.generate(prompts, sampling_params=greedy(10))
    bad = outputs.pop(2)
    assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", [], "")
    assert bad.error is not None
    assert "NaN" in bad.error
    assert math.isfinite(bad.cumulative_logprob)
    del prompts[2]
    assert [output.token_ids for output in outputs] == [alone(prompt, 10) for prompt in prompts]
    assert all(output.error is None for output in outputs)


def test_nan_in_the_middle_of_decoding(engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]) -> None:
    """What was generated before is in the output."""
    expected = alone(PROMPT, 12)
    index = next(i for i in range(4, 11) if expected[i] not in [*expected[:i], *PROMPT])
    engine = engine_with()
    poison(engine, expected[index])
    output = engine.generate([PROMPT], sampling_params=greedy(12))[0]
    assert output.finish_reason == "error"
    assert output.token_ids == expected[: index + 1]
    assert output.text == engine.tokenizer.decode(expected[: index + 1])  # type: ignore[union-attr]


def test_nan_does_not_live_on_in_its_blocks(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]
) -> None:
    """A later sequence that gets the same blocks, and fills only part of them, is not affected."""
    engine = engine_with(num_gpu_blocks=12, enable_prefix_caching=False, max_model_len=192)
    poison(engine, 5)
    prompts = [prompt for prompt in ([9, 8], [7], [30, 40, 50]) if 5 not in alone(prompt, 20)]
    assert prompts
    for prompt in prompts:
        assert engine.generate([[9, 5, 7] * 60], sampling_params=greedy(1))[0].finish_reason == "error"
        output = engine.generate([prompt], sampling_params=greedy(20))[0]
        assert (output.error, output.token_ids) == (None, alone(prompt, 20))


def test_nan_does_not_live_on_in_the_prefix_cache(
    engine_with: Callable[..., LLMEngine], alone: Callable[..., list[int]]
) -> None:
    """A prompt that begins as a failed one did, before what broke it, is computed anew."""
    engine = engine_with(block_size=4, max_prefill_tokens=24)
    poison(engine, 5)
    healthy = [30, 40, 50, 60] * 4
    assert 5 not in alone(healthy, 10)
    for broken in ([*healthy, 5, 9], [*healthy, *healthy[:4], 5, 9, *healthy * 2]):  # in one chunk, and in several
        assert engine.generate([broken], sampling_params=greedy(3))[0].finish_reason == "error"
        output = engine.generate([healthy], sampling_params=greedy(10))[0]
        assert (output.error, output.token_ids) == (None, alone(healthy, 10))


# Interrupts


def test_an_interrupted_generate(
    engine: LLMEngine, alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two steps: none of its requests is left, finished or not, and the engine works on."""
    step = LLMEngine.step
    calls = 0

    def interrupted(self: LLMEngine) -> list[GenerateOutput]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return step(self)

    other = engine.add_request(PROMPT, sampling_params=greedy(30))
    with monkeypatch.context() as patch:
        patch.setattr(LLMEngine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts_of(20), sampling_params=[greedy(2 + i) for i in range(20)])
    assert engine.stats().num_waiting + engine.stats().num_running + engine.stats().num_prefilling == 1
    assert not engine._processor._outputs
    assert fetch(engine, other).token_ids == alone(PROMPT, 30)


@pytest.fixture(scope="module", params=[1, 3])
def broken_engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[LLMEngine]:
    """An engine whose steps are broken off again and again."""
    with make_engine(folder, steps_in_flight=request.param, block_size=4, max_prefill_tokens=32) as engine:
        yield engine


def break_off(
    monkeypatch: pytest.MonkeyPatch, engine: LLMEngine, place: str, error: BaseException, *, call: int, after: bool
) -> None:
    """The ``call``-th call of a method that every step makes, or every end, raises before or after it has run."""
    owner: object = StepHandle
    for part in (engine._processor, scheduler_of(engine), runner_of(engine)):
        owner = part if hasattr(part, place) else owner
    method = getattr(owner, place)
    calls = 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise error
        result = method(*arguments)
        if calls == call:
            raise error
        return result

    monkeypatch.setattr(owner, place, broken)


STEP = ["schedule", "prepare", "execute", "result", "update"]
"""What a step consists of: an error there ends its requests."""
OUTPUT = ["advance", "end"]
"""What follows: an error there belongs to no request."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("fire")], ids=repr)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", [*STEP, *OUTPUT])
def test_a_step_that_is_broken_off(
    broken_engine: LLMEngine,
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    after: bool,
    error: BaseException,
) -> None:
    """By Ctrl-C or an error in any of its parts, whoever runs it: that is what the caller sees, nothing is left of what
    they asked for, and other people's requests are right, or end with the error rather than never."""
    engine = broken_engine
    raises = isinstance(error, KeyboardInterrupt) or place in OUTPUT
    message = describe(error)
    lengths = [2, 3, 3, 9]
    prompts = prompts_of(4, seed=19)

    def check(output: GenerateOutput, expected: list[int]) -> None:
        if output.finish_reason == "error":
            assert output.error == message
            assert output.token_ids == expected[: len(output.token_ids)]
        else:
            assert (output.finish_reason, output.token_ids) == ("length", expected)

    def generate() -> None:
        params = [greedy(length) for length in lengths]
        for output, prompt, length in zip(
            engine.generate(prompts, sampling_params=params), prompts, lengths, strict=True
        ):
            check(output, alone(prompt, length))

    def stream() -> None:
        *_, last = engine.stream(prompts[0], sampling_params=greedy(6))
        assert last.output is not None
        check(last.output, alone(prompts[0], 6))

    def poll() -> None:
        """The requests are not the caller's alone: an interrupted call loses none of them."""
        ids = [
            engine.add_request(prompt, sampling_params=greedy(length))
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        broken = None
        while engine.has_unfinished_requests:
            try:
                engine.step()
            except (KeyboardInterrupt, RuntimeError) as caught:
                assert broken is None
                broken = caught
        for request_id, prompt, length in zip(ids, prompts, lengths, strict=True):
            output = engine.get_output(request_id)
            assert output is not None
            check(output, alone(prompt, length))
        if broken is not None:
            raise broken

    for use in (generate, stream, poll):
        for call in (1, 2, 4):
            other = engine.add_request(PROMPT, sampling_params=greedy(9))
            engine.step()
            with monkeypatch.context() as patch:
                break_off(patch, engine, place, error, call=call, after=after)
                try:
                    use()
                except type(error) as caught:
                    assert caught is error and raises
                    assert scheduler_of(engine).num_unfinished <= 1
                else:
                    assert not raises or (place == "end" and call > 1)  # there are not as many ends
            check(fetch(engine, other, most_calls=100), alone(PROMPT, 9))
            assert_idle(engine)
            assert engine.generate([PROMPT], sampling_params=greedy(9))[0].token_ids == alone(PROMPT, 9)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("fire")], ids=repr)
@pytest.mark.parametrize("use", ["generate", "stream"])
def test_a_tokenizer_that_fails(
    engine: LLMEngine,
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    use: str,
    error: BaseException,
) -> None:
    """Its request ends with the error, nobody else's; an interrupt inside it goes to the caller."""
    other = engine.add_request(PROMPT, sampling_params=greedy(30))
    decode, calls = engine.tokenizer.decode, 0  # type: ignore[union-attr]

    def failing(*arguments: Any, **options: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return decode(*arguments, **options)

    def run() -> list[GenerateOutput]:
        if use == "generate":
            return engine.generate(prompts_of(2), sampling_params=greedy(9, stop="not there"))
        *_, last = engine.stream(prompts_of(1)[0], sampling_params=greedy(9))
        assert last.output is not None
        return [last.output]

    with monkeypatch.context() as patch:
        patch.setattr(engine.tokenizer, "decode", failing)
        if isinstance(error, Exception):
            outputs = run()
            assert [output.error for output in outputs].count("RuntimeError: fire") == 1
            assert {output.finish_reason for output in outputs} <= {"error", "length"}
        else:
            with pytest.raises(KeyboardInterrupt):
                run()
            assert scheduler_of(engine).num_unfinished == 1
    assert fetch(engine, other).token_ids == alone(PROMPT, 30)


@pytest.mark.parametrize("steps_in_flight", [1, 3])
def test_an_interrupt_while_waiting_for_tokens(
    engine_with: Callable[..., LLMEngine],
    alone: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    steps_in_flight: int,
) -> None:
    """Nothing is lost: the tokens are read at the next step."""
    engine = engine_with(steps_in_flight=steps_in_flight)
    inside = engine.add_request(PROMPT, sampling_params=greedy(30))
    for _ in range(5):
        engine.step()
    result = StepHandle.result
    with monkeypatch.context() as patch:
        patch.setattr(StepHandle, "result", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts_of(3), sampling_params=greedy(20))
    assert StepHandle.result is result
    assert fetch(engine, inside).token_ids == alone(PROMPT, 30)


# Threads


def test_one_thread_at_a_time(
    engine: LLMEngine, alone: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call from another thread while one is under way is refused, and neither thread's requests take harm."""
    prompts = prompts_of(4, seed=23)
    stream = engine.stream(prompts[3], max_tokens=4, sampling_params=greedy())
    next(stream)
    refused: list[str] = []
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: engine.generate([prompts[0]]),
        "chat": lambda: engine.chat(MESSAGES),
        "add_request": lambda: engine.add_request(prompts[0]),
        "get_output": lambda: engine.get_output("request-0"),
        "abort": lambda: engine.abort("request-0"),
        "step": engine.step,
        "stream": lambda: next(engine.stream(prompts[0])),
        "next": lambda: next(stream),
        "shutdown": engine.shutdown,
    }

    def call_all() -> None:
        for name, call in calls.items():
            try:
                call()
            except EngineBusyError:
                refused.append(name)

    schedule = scheduler_of(engine).schedule

    def in_the_middle() -> SchedulerOutputs:
        if not refused:
            other = threading.Thread(target=call_all)
            other.start()
            other.join()
        return schedule()

    with monkeypatch.context() as patch:
        patch.setattr(scheduler_of(engine), "schedule", in_the_middle)
        outputs = engine.generate(prompts[:2], max_tokens=5, temperature=0.0)
    assert refused == list(calls)
    assert [output.token_ids for output in outputs] == [alone(prompt, 5) for prompt in prompts[:2]]
    stream.close()
    assert_idle(engine)


def test_threads_in_turn(engine: LLMEngine, alone: Callable[..., list[int]]) -> None:
    """One after the other any of them may; a stream that another thread drops goes with the next step."""
    prompt = prompts_of(1, seed=24)[0]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for pool in (one, two):
            output = pool.submit(engine.generate, [prompt], max_tokens=4, temperature=0.0).result()[0]
            assert output.token_ids == alone(prompt, 4)
        streams = [engine.stream(prompt, max_tokens=50, sampling_params=greedy())]
        next(streams[0])
        with engine._driving():
            one.submit(streams.clear).result()
        assert engine.stats().num_running == 1
    engine.step()
    assert_idle(engine)


def test_a_gpu_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs say so, later calls as well; leaving the block does not hide the user's own exception."""
    engine = make_engine(folder)

    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(runner_of(engine), "execute", fail)
    monkeypatch.setattr(runner_of(engine), "synchronize", fail)
    outputs = engine.generate(prompts_of(9, seed=25), max_tokens=3)
    assert {output.error for output in outputs} == {"RuntimeError: CUDA error: unspecified launch failure"}
    calls: list[Callable[[], object]] = [
        lambda: engine.generate([PROMPT]),
        lambda: engine.chat(MESSAGES),
        lambda: engine.add_request(PROMPT),
        lambda: next(engine.stream(PROMPT)),
    ]
    for call in calls:
        with pytest.raises(EngineDeadError, match=r"unspecified launch failure.*start a new process"):
            call()
    assert not engine.has_unfinished_requests
    with pytest.raises(ZeroDivisionError), engine:
        raise ZeroDivisionError
    with pytest.raises(EngineClosedError):
        engine.step()


# Sampling


def test_seeds_across_engines(engine: LLMEngine, engine_with: Callable[..., LLMEngine]) -> None:
    """A request's own seed decides alone: another engine with another seed and other options gives its tokens."""
    params = SamplingParams(temperature=1.3, top_p=0.97, seed=123, max_tokens=40, ignore_eos=True)
    expected = engine.generate([PROMPT], sampling_params=params)[0].token_ids
    other = engine_with(seed=99, max_num_seqs=3, block_size=8, max_prefill_tokens=2, enable_prefix_caching=False)
    for _ in range(2):
        outputs = other.generate([[7, 8], PROMPT, [9]], sampling_params=params)
        assert outputs[1].token_ids == expected
    assert len(set(expected)) > 8


def test_the_engines_seed(engine_with: Callable[..., LLMEngine]) -> None:
    """Requests without a seed: the same program gives the same tokens again; another engine seed gives others, and no
    two requests of one engine draw alike."""
    params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    runs = []
    for seed in (0, 0, 1):
        engine = engine_with(seed=seed)
        runs.append([output.token_ids for output in engine.generate([PROMPT] * 6, sampling_params=params)])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for run in (runs[0], runs[2]) for tokens in run}) == 12


def test_seeds_use_all_their_bits(engine: LLMEngine) -> None:
    """Seeds that differ in one high or low bit only."""
    params = [
        SamplingParams(temperature=2.0, seed=seed, max_tokens=20, ignore_eos=True)
        for seed in (0, 1, 2**31, 2**32, 2**62, 2**63 - 1)
    ]
    outputs = engine.generate([PROMPT] * len(params), sampling_params=params)
    assert len({tuple(output.token_ids) for output in outputs}) == len(params)


def test_logprobs_are_the_models_own(engine: LLMEngine) -> None:
    """Of the tokens drawn, at temperature 1 and uncut: top_k=1 at any temperature draws greedily, and sums the same."""
    first, second = engine.generate(
        [PROMPT] * 2,
        sampling_params=[greedy(10), SamplingParams(temperature=3.0, top_k=1, max_tokens=10, ignore_eos=True)],
    )
    assert first.token_ids == second.token_ids
    assert first.cumulative_logprob == pytest.approx(second.cumulative_logprob, abs=1e-4)
    assert -10 * math.log(320) < first.cumulative_logprob < 0
    wild = engine.generate([PROMPT], sampling_params=SamplingParams(temperature=50.0, seed=0, max_tokens=10))[0]
    assert wild.cumulative_logprob < first.cumulative_logprob


# Stats


def test_stats(engine_with: Callable[..., LLMEngine]) -> None:
    """Every count of a small run, by hand."""
    engine = engine_with(
        decode_buckets=[4], prefill_buckets=[16, 64], max_prefill_tokens=64, enable_prefix_caching=False
    )
    fresh = engine.stats()
    assert (fresh.num_finished, fresh.decode_steps, fresh.decode_padding, fresh.prefill_padding) == (0, 0, 0.0, 0.0)
    ids = [engine.add_request([10 * i + j for j in range(1, 6)], sampling_params=greedy(4)) for i in range(1, 4)]
    assert engine.stats().num_waiting == 3
    engine.step()
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_prefilling) == (3, 0, 0)
    assert (stats.kv_blocks_used, stats.kv_blocks_total, stats.kv_blocks_cached) == (3, 8 * 12, 0)
    for request_id in ids:
        fetch(engine, request_id)
    stats = engine.stats()
    assert (stats.num_finished, stats.num_running, stats.kv_blocks_used) == (3, 0, 0)
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.output_tokens) == (15, 0, 12)
    assert (stats.prefill_steps, stats.decode_steps, stats.off_graph_steps) == (1, 3, 0)
    assert stats.prefill_buckets == {16: BucketUse(1, 15, 1, pytest.approx(1.0), 16.0)}
    assert stats.decode_buckets == {4: BucketUse(3, 9, 3, pytest.approx(3.0), 12.0)}
    assert (stats.prefill_padding, stats.decode_padding) == (1 / 16, 0.25)
    assert stats.preemptions == {"swap": 0, "recompute": 0}
    assert (stats.decode_costs, stats.context_ms_per_token, stats.costs_measured) == ({4: 4.0, 8: 8.0}, 0.0, False)
    assert stats.memory.num_gpu_blocks == 96
    assert stats.graphs == ()
    assert sum(stats.startup.phases.values()) == pytest.approx(stats.startup.total)
    assert fresh.num_finished == 0  # a snapshot stays as it was


def test_cached_prompt_tokens(engine_with: Callable[..., LLMEngine]) -> None:
    """The second time, all full blocks but the last token's come from the cache; computed and cached add up."""
    engine = engine_with()
    prompt = prompts_of(1, seed=17)[0][:1] * 50
    first, second = (engine.generate([prompt], max_tokens=1, temperature=0.0)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (50 + 2, 48)
    assert stats.kv_blocks_cached == 3
    assert first.token_ids == second.token_ids


# The end


def test_shutdown(folder: Path) -> None:
    """Drops everything, may be called again, and every further call says so."""
    engine = make_engine(folder)
    request_id = engine.add_request(PROMPT, max_tokens=50)
    stream = engine.stream(PROMPT, max_tokens=50)
    next(stream)
    engine.shutdown()
    engine.shutdown()
    calls: list[Callable[[], object]] = [
        lambda: engine.generate([PROMPT]),
        lambda: engine.stream(PROMPT),
        lambda: engine.chat(MESSAGES),
        lambda: engine.stream_chat(MESSAGES),
        lambda: engine.add_request(PROMPT),
        lambda: engine.get_output(request_id),
        lambda: engine.abort(request_id),
        engine.step,
        engine.stats,
        engine.__enter__,
        lambda: engine.tokenizer,
        lambda: engine.max_model_len,
        lambda: engine.has_chat_template,
        lambda: engine.has_unfinished_requests,
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="shut down"):
            call()


def test_what_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"takes an EngineConfig\(model=\.\.\.\), got 'some/model'"):
        LLMEngine("some/model")  # type: ignore[arg-type]


def test_context_manager(folder: Path) -> None:
    """Closed at the end, also by an exception, which goes through; a stream left open does not mind."""
    with make_engine(folder) as engine:
        stream: Iterator[StreamIncrement] = engine.stream(PROMPT, max_tokens=50)
        next(stream)
    del stream
    gc.collect()
    with pytest.raises(EngineClosedError):
        engine.stats()
    with pytest.raises(ZeroDivisionError), make_engine(folder) as engine:
        raise ZeroDivisionError
    with pytest.raises(EngineClosedError):
        engine.stats()


def test_nothing_is_kept_of_a_request(engine: LLMEngine) -> None:
    """After hundreds of requests, aborts and streams no record of one is alive anywhere."""

    def records() -> list[object]:
        gc.collect()
        return [value for value in gc.get_objects() if type(value) in (Request, SchedulerOutputs, StepHandle)]

    others = records()  # of other tests, which they keep on purpose
    known = set(map(id, others))
    draw = random.Random(2)
    for _ in range(60):
        ids = [engine.add_request(prompt, max_tokens=draw.randint(1, 3)) for prompt in prompts_of(5, longest=5)]
        engine.abort(ids.pop())
        for request_id in ids:
            fetch(engine, request_id)
    for _ in zip(range(2), engine.stream(PROMPT, max_tokens=9), strict=False):
        pass
    engine.generate([PROMPT] * 3, max_tokens=2)
    assert_idle(engine)
    assert not [record for record in records() if id(record) not in known]
