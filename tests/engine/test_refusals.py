"""What the engine refuses, before anything is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLMEngine, SamplingParams
from mini_infer.exceptions import InvalidRequestError, OutOfMemoryError
from tests.engine.driving import PROMPT, assert_idle, encode, fetch, greedy, make_engine
from tests.tiny_models import make_tiny_model

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
