"""The engine on a GPU: tokens equal to the Transformers library in float32, logits close to it in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.graphs.decoder import prefill_logits
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.prefill_inputs import PrefillBuffer
from mini_infer.graphs.state import DecodeState
from mini_infer.loader import load_params, read_model_files
from mini_infer.step import PrefillChunk
from tests.tiny_models import VARIANTS, greedy, make_tiny_model, penalized
from tests.tiny_tokenizers import save_tiny_tokenizer

pytestmark = pytest.mark.gpu

GREEDY_64 = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_tokenizer(folder)
    return folder, make_tiny_model(request.param, folder)


def prompts_of(count: int, longest: int = 90) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


def test_greedy_tokens(case: tuple[Path, PreTrainedModel]) -> None:
    """Float32: 64 greedy tokens of 9 prompts, with preemption and chunks, equal to the library's on the CPU."""
    folder, model = case
    prompts = prompts_of(9)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        max_num_seqs=8,
        max_model_len=160,
        num_gpu_blocks=40,
        num_cpu_blocks=60,
        max_prefill_tokens=64,
        preemption="swap",
        progress=False,
    )
    with LLMEngine(config) as engine:
        outputs = engine.generate(prompts, sampling_params=GREEDY_64)
        assert engine.stats().preemptions["swap"] > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy(model, prompt, 64)


def test_penalties(tmp_path: Path) -> None:
    """Float32: penalties of every kind beside rows without, which swap and move: the tokens of the formula."""
    save_tiny_tokenizer(tmp_path)
    model = make_tiny_model("llama3-gqa", tmp_path)
    penalties: list[dict[str, float]] = [
        {},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 0.6},
        {"repetition_penalty": 1.4},
    ]
    prompts = prompts_of(10, longest=40)
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, **penalties[index % 4])
        for index, length in enumerate([30, 12, 40, 1, 40, 40, 40, 1, 25, 40])
    ]
    config = EngineConfig(
        model=str(tmp_path),
        dtype="float32",
        max_num_seqs=8,
        max_model_len=112,
        block_size=4,
        num_gpu_blocks=60,
        num_cpu_blocks=100,
        max_prefill_tokens=24,
        preemption="swap",
        progress=False,
    )
    with LLMEngine(config) as engine:
        outputs = engine.generate(prompts, sampling_params=params)
        assert engine.stats().preemptions["swap"] > 0
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        assert output.token_ids == penalized(model, prompt, each)


@torch.inference_mode()
def test_bfloat16_logits(case: tuple[Path, PreTrainedModel]) -> None:
    """Bfloat16: logits no further from the float32 ones than the library's own in bfloat16, give or take a half."""
    folder, model = case
    device = torch.device("cuda")
    files = read_model_files(folder)
    params = load_params(files, dtype=torch.bfloat16, device=device, max_positions=256)
    kv = KVCache(files.spec, 16, 16, torch.bfloat16, device)
    prompt = prompts_of(1, longest=200)[0] * 2
    table = tuple(range(1, 1 + -(-len(prompt) // 16)))
    chunk = PrefillChunk("a", 0, tuple(prompt), table, SamplingParams(), 0, is_last=True)
    buffer = PrefillBuffer(
        len(prompt),
        1,
        block_size=16,
        max_blocks=32,
        state=DecodeState(1, 32, files.spec.vocab_size, device),
        device=device,
    )
    buffer.fill([chunk])
    logits = prefill_logits(files.spec, params, kv, buffer.inputs).double().cpu()
    expected = model(torch.tensor([prompt])).logits[0].double()
    library = model.to(device, torch.bfloat16)(torch.tensor([prompt], device=device)).logits[0].double().cpu()
    model.to("cpu", torch.float32)
    error = (logits - expected).norm() / expected.norm()
    library_error = (library - expected).norm() / expected.norm()
    assert error < 1.5 * library_error + 1e-3, f"{error:.2e} against the library's {library_error:.2e}"


@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_swaps_change_no_token(tmp_path: Path, steps_in_flight: int) -> None:
    """With a third of the blocks wanted, sequences swap out and in beside steps in flight, and no token changes."""
    save_tiny_tokenizer(tmp_path)
    make_tiny_model("llama3-gqa", tmp_path)
    prompts = prompts_of(24, longest=60)
    tokens = {}
    for num_gpu_blocks in (8 * 40, 110):
        config = EngineConfig(
            model=str(tmp_path),
            dtype="float32",
            max_num_seqs=8,
            max_model_len=160,
            block_size=4,
            num_gpu_blocks=num_gpu_blocks,
            num_cpu_blocks=400,
            preemption="swap",
            enable_prefix_caching=False,
            steps_in_flight=steps_in_flight,
            progress=False,
        )
        with LLMEngine(config) as engine:
            outputs = engine.generate(prompts, sampling_params=GREEDY_64)
            preemptions = engine.stats().preemptions
        tokens[num_gpu_blocks] = [output.token_ids for output in outputs]
        assert preemptions["recompute"] == 0
        assert (preemptions["swap"] > 0) == (num_gpu_blocks == 110)
    assert tokens[110] == tokens[8 * 40]


def test_two_engines_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine goes on as before while another one starts beside it, measures, serves, and is shut down."""
    monkeypatch.setenv("MINI_INFER_HOME", str(tmp_path / "home"))
    save_tiny_tokenizer(tmp_path)
    make_tiny_model("llama3-gqa", tmp_path)
    options: dict[str, Any] = {"max_num_seqs": 8, "num_gpu_blocks": 80, "max_model_len": 160, "progress": False}
    prompts = prompts_of(9)
    with LLMEngine(EngineConfig(model=str(tmp_path), dtype="float32", **options)) as first:

        def tokens() -> list[list[int]]:
            return [output.token_ids for output in first.generate(prompts, sampling_params=GREEDY_64)]

        expected = tokens()
        with LLMEngine(EngineConfig(model=str(tmp_path), dtype="bfloat16", **options)) as second:
            assert tokens() == expected
            second.generate(prompts, sampling_params=GREEDY_64)
            assert tokens() == expected
        assert tokens() == expected
