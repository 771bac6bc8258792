"""`generate`: what goes in, what comes out, where a text ends, and how it is drawn.

Greedy tokens are compared with the Transformers library in tests/e2e; here they are compared with the engine's own
for one prompt alone.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLMEngine, SamplingParams
from tests.engine.driving import MESSAGES, PROMPT, assert_idle, encode, fetch, greedy, make_engine, prompts_of

# Generate


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
