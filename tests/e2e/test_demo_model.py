"""SmolLM2 for real: greedy tokens equal to the Transformers library's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.demo_model import demo_model_available, demo_model_path

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not demo_model_available(), reason="the demo model is not downloaded"),
]

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain recursion to a child.",
    "List three uses of copper.",
    "What is 17 plus 25?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Who was Ada Lovelace?",
    "Write a Python function that reverses a string.",
    "What causes the tides?",
    "Describe a sunset in two sentences.",
    "What is the difference between a virus and a bacterium?",
    "Name the planets of the solar system.",
    "How do bees make honey?",
    "Tell me a short story about a lost dog.",
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_greedy_tokens(device: str) -> None:
    """128 greedy tokens on 16 prompts in float32, decoded in one batch.

    The library computes each whole text at once: if its most likely next token is ours at every position, its own
    greedy generation is ours, token by token.
    """
    config = EngineConfig(
        model=str(demo_model_path()), dtype="float32", device=device, max_num_seqs=16, max_model_len=512, progress=False
    )
    params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    with LLMEngine(config) as engine:
        assert engine.tokenizer is not None
        prompts = [engine.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in QUESTIONS]
        outputs = engine.generate(prompts, sampling_params=params)
        assert engine.stats().off_graph_steps == 0
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).to(device)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            text = torch.tensor([prompt + output.token_ids[:-1]], device=device)
            logits = model(text).logits[0, len(prompt) - 1 :]
        assert output.token_ids == logits.argmax(-1).tolist()


def test_chat_answer() -> None:
    """The demo's own question gets the right answer."""
    config = EngineConfig(
        model=str(demo_model_path()), dtype="float32", device="cpu", max_num_seqs=2, max_model_len=512, progress=False
    )
    with LLMEngine(config) as engine:
        output = engine.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            sampling_params=SamplingParams(temperature=0.0, max_tokens=32),
        )
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
