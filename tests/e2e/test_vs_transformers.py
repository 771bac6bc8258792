"""The whole engine against the Transformers library: logits and greedy tokens, in float32, on tiny random models."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mini_infer import EngineConfig, LLMEngine, SamplingParams
from mini_infer.graphs.decoder import prefill_logits
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.prefill_inputs import PrefillBuffer
from mini_infer.graphs.state import DecodeState
from mini_infer.kernels.linear_plan import M_BUCKETS, Tile
from mini_infer.loader import load_params, read_model_files
from mini_infer.step import PrefillChunk
from tests.tiny_models import VARIANTS, greedy, make_tiny_model, penalized
from tests.tiny_tokenizers import save_tiny_tokenizer

GREEDY_64 = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """A tiny model on disk, and in memory as the Transformers library runs it."""

    folder: Path
    model: PreTrainedModel


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_tokenizer(folder)
    return Case(folder, make_tiny_model(request.param, folder))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_tokenizer(folder)
    return Case(folder, make_tiny_model("llama3-gqa", folder))


def make_engine(case: Case, **options: Any) -> LLMEngine:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 9,
        "max_model_len": 256,
        "num_cpu_blocks": 0,
        "measure_costs": False,
        "progress": False,
    }
    return LLMEngine(EngineConfig(model=str(case.folder), **{**defaults, **options}))


def make_prompts(count: int, *, seed: int, longest: int = 90) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 320) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.inference_mode()
def test_logits(case: Case) -> None:
    """Logits of two packed prompts, padded up to a bucket, to a relative error of 1e-5."""
    files = read_model_files(case.folder)
    device = torch.device("cpu")
    params = load_params(files, dtype=torch.float32, device=device, max_positions=256)
    kv = KVCache(files.spec, 40, 16, torch.float32, device)
    prompts = make_prompts(2, seed=1)
    chunks, start_block = [], 1
    for index, prompt in enumerate(prompts):
        table = tuple(range(start_block, start_block + -(-len(prompt) // 16)))
        start_block = table[-1] + 1
        chunks.append(PrefillChunk(str(index), 0, tuple(prompt), table, SamplingParams(), 0, is_last=True))
    total = sum(map(len, prompts))
    buffer = PrefillBuffer(
        total + 7,
        2,
        block_size=16,
        max_blocks=16,
        state=DecodeState(1, 16, files.spec.vocab_size, device),
        device=device,
    )
    buffer.fill(chunks)
    logits = prefill_logits(files.spec, params, kv, buffer.inputs)
    begin = 0
    for prompt in prompts:
        expected = case.model(torch.tensor([prompt])).logits[0]
        assert relative_error(logits[begin : begin + len(prompt)], expected) < 1e-5
        begin += len(prompt)


def test_greedy_tokens(case: Case) -> None:
    """64 greedy tokens of 5 prompts in one batch, chunked prefill, for every family and variant.

    Of these prompts no two best logits are nearer than 2e-4, ten times what either float32 result may be off.
    """
    prompts = make_prompts(5, seed=6)
    with make_engine(case, max_prefill_tokens=32) as engine:
        outputs = engine.generate(prompts, sampling_params=GREEDY_64)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finish_reason == "length"
        assert output.token_ids == greedy(case.model, prompt, 64)


@pytest.mark.parametrize("num_prompts", range(1, 10))
def test_batch_sizes(llama: Case, num_prompts: int) -> None:
    """Every batch size from 1 to 9, with dense buckets and with a list that pads."""
    prompts = make_prompts(num_prompts, seed=num_prompts)
    expected = [greedy(llama.model, prompt, 64) for prompt in prompts]
    for buckets in (None, [4]):
        with make_engine(llama, decode_buckets=buckets) as engine:
            outputs = engine.generate(prompts, sampling_params=GREEDY_64)
        assert [output.token_ids for output in outputs] == expected


@pytest.mark.parametrize("steps_in_flight", [1, 3])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
def test_small_pool(llama: Case, preemption: str, caching: bool, steps_in_flight: int) -> None:
    """A pool that forces preemption changes no token, whether it swaps or computes again."""
    prompts = make_prompts(7, seed=3, longest=40)
    expected = [greedy(llama.model, prompt, 64) for prompt in prompts]
    with make_engine(
        llama,
        max_model_len=112,
        block_size=4,
        num_gpu_blocks=40,
        num_cpu_blocks=0 if preemption == "recompute" else 100,
        prefill_share=1.0,
        preemption=preemption,
        enable_prefix_caching=caching,
        max_prefill_tokens=24,
        steps_in_flight=steps_in_flight,
        measure_costs=True,
    ) as engine:
        outputs = engine.generate(prompts, sampling_params=GREEDY_64)
        stats = engine.stats()
    assert [output.token_ids for output in outputs] == expected
    assert sum(stats.preemptions.values()) > 0
    if preemption != "auto":
        assert stats.preemptions[preemption] > 0
    assert stats.kv_blocks_used == 0


@pytest.mark.parametrize("caching", [True, False])
def test_prefix_hits(llama: Case, caching: bool) -> None:
    """Prompts that begin alike give the same tokens as without a cache, and the cache is used."""
    shared = make_prompts(1, seed=4, longest=60)[0] * 2
    prompts = [shared[: 20 + 5 * i] + tail for i, tail in enumerate(make_prompts(6, seed=5, longest=20))]
    prompts.append(list(prompts[-1]))  # a prompt that is cached whole still computes its last token
    expected = [greedy(llama.model, prompt, 64) for prompt in prompts]
    with make_engine(llama, enable_prefix_caching=caching, block_size=8) as engine:
        outputs = [engine.generate([prompt], sampling_params=GREEDY_64)[0] for prompt in prompts]
    assert [output.token_ids for output in outputs] == expected
    assert (sum(output.num_cached_tokens for output in outputs) > 0) is caching


@pytest.mark.parametrize("max_prefill_tokens", [1, 7, 512])
def test_chunked_prefill(llama: Case, max_prefill_tokens: int) -> None:
    """Prompts cut into chunks of one token, of an odd number, or not at all."""
    prompts = make_prompts(4, seed=6)
    expected = [greedy(llama.model, prompt, 64) for prompt in prompts]
    with make_engine(llama, max_prefill_tokens=max_prefill_tokens, prefill_share=0.9) as engine:
        outputs = engine.generate(prompts, sampling_params=GREEDY_64)
    assert [output.token_ids for output in outputs] == expected


def test_cumulative_logprob(llama: Case) -> None:
    """The sum of log probabilities is that of the model's own distribution."""
    prompt = make_prompts(1, seed=7)[0]
    with make_engine(llama) as engine:
        output = engine.generate(prompt, max_tokens=8, temperature=0.0)[0]
    ids = torch.tensor([prompt + output.token_ids])
    with torch.no_grad():
        logprobs = llama.model(ids).logits[0].log_softmax(-1)
    expected = sum(
        logprobs[len(prompt) - 1 + index, token_id].item() for index, token_id in enumerate(output.token_ids)
    )
    assert output.cumulative_logprob == pytest.approx(expected, abs=1e-3)


def test_squares_reach_the_product_that_norms(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles that norm by the squares which the products before left, in place of kernels that norm."""
    leaves = Tile("tma", 64, 32, 4, block_m=16, leaves=True)
    norms = Tile("tma", 64, 32, 4, block_m=16, norms=True)

    def planned(params: Params) -> Params:
        layers = [
            replace(
                layer,
                **{name: replace(getattr(layer, name), tiles=(leaves,) * len(M_BUCKETS)) for name in ("o", "down")},
                **{name: replace(getattr(layer, name), tiles=(norms,) * len(M_BUCKETS)) for name in ("qkv", "gate_up")},
            )
            for layer in params.layers
        ]
        return replace(params, layers=tuple(layers))

    monkeypatch.setattr("mini_infer.loader.pack_linear", lambda weight: weight)
    monkeypatch.setattr("mini_infer.loader._planned", planned)
    prompts = make_prompts(3, seed=10)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with make_engine(llama, max_prefill_tokens=32) as engine:
        outputs = engine.generate(prompts, sampling_params=params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy(llama.model, prompt, 16)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(llama: Case, penalty: float) -> None:
    """The library's own repetition penalty, on prompts in chunks that meet different buckets."""
    prompts = make_prompts(5, seed=8)
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, repetition_penalty=penalty)
    with make_engine(llama, max_prefill_tokens=32) as engine:
        outputs = engine.generate(prompts, sampling_params=params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy(llama.model, prompt, 48, repetition_penalty=penalty)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_penalties(llama: Case, preemption: str, steps_in_flight: int) -> None:
    """Rows with and without penalties side by side, some of one token only, which move and lose their place."""
    penalties = [{}, {"presence_penalty": 2.0}, {"frequency_penalty": 0.6}, {"repetition_penalty": 1.4},
                 {"repetition_penalty": 0.8, "presence_penalty": 1.5, "frequency_penalty": 0.3}]  # fmt: skip
    prompts = make_prompts(10, seed=9, longest=40)
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, **penalties[index % 5])
        for index, length in enumerate([30, 12, 40, 1, 40, 40, 40, 1, 25, 40])
    ]
    expected = [penalized(llama.model, prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    with make_engine(
        llama,
        max_model_len=112,
        block_size=4,
        num_gpu_blocks=30,
        num_cpu_blocks=0 if preemption == "recompute" else 100,
        preemption=preemption,
        max_prefill_tokens=24,
        steps_in_flight=steps_in_flight,
    ) as engine:
        outputs = engine.generate(prompts, sampling_params=params)
        stats = engine.stats()
    assert [output.token_ids for output in outputs] == expected
    assert stats.preemptions[preemption] > 0
    plain = [greedy(llama.model, prompt, each.max_tokens) for prompt, each in zip(prompts, params, strict=True)]
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) >= 5, "the penalties made no difference"
