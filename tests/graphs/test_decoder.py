"""The steps as functions: traceable without a break, writing their own slots only, deaf to everything they do not own.

What they compute is compared with the Transformers library in tests/e2e.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mini_infer.graphs import decoder
from mini_infer.graphs.decoder import decode_step, prefill_logits, prefill_step
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.params import Params
from mini_infer.graphs.prefill_inputs import PrefillBuffer, PrefillInputs
from mini_infer.graphs.spec import ModelSpec
from mini_infer.graphs.state import DecodeRows, DecodeState
from mini_infer.loader import load_params, read_model_files
from mini_infer.sampling import SamplingParams
from mini_infer.step import History, PlaceRow, PrefillChunk
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")
BLOCK_SIZE = 4
MAX_BLOCKS = 10
NUM_BLOCKS = 40
NUM_SEQS = 5
MAX_ROWS = 9
VOCAB = 320
SAMPLING = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.2, top_k=20),
    SamplingParams(temperature=1.0, min_p=0.05),
]
LENGTHS = (1, 4, 7, 17, 30)  # tokens at the decode step, that step's own included


@dataclass(frozen=True)
class Weights:
    spec: ModelSpec
    params: Params


@pytest.fixture(
    scope="module", params=["llama3-gqa", "llama-biases", "mistral-window", "qwen2-window", "qwen3", "llama-mqa-tied"]
)
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """A tiny model with plain weights: the packed ones' product cannot be traced."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    make_tiny_model(request.param, folder)
    files = read_model_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_infer.loader.pack_linear", lambda weight: weight)
        params = load_params(files, dtype=torch.float32, device=CPU, max_positions=MAX_BLOCKS * BLOCK_SIZE)
    assert params.head.packed is None
    return Weights(files.spec, params)


def tables() -> list[tuple[int, ...]]:
    """A block table for each sequence, scattered over the pool."""
    ids = list(range(1, NUM_BLOCKS + 1))
    random.Random(0).shuffle(ids)
    result = []
    for length in LENGTHS:
        count = -(-length // BLOCK_SIZE)
        result.append(tuple(ids[:count]))
        ids = ids[count:]
    return result


TABLES = tables()


def noisy_cache(spec: ModelSpec, seed: int = 0, scale: float = 1.0) -> KVCache:
    kv = KVCache(spec, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
    kv.blocks.copy_(torch.randn(kv.blocks.shape, generator=torch.Generator().manual_seed(seed)) * scale)
    return kv


def copy_of(kv: KVCache, spec: ModelSpec) -> KVCache:
    copy = KVCache(spec, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
    copy.blocks.copy_(kv.blocks)
    return copy


def decode_rows(bucket: int = NUM_SEQS, order: tuple[int, ...] = tuple(range(NUM_SEQS))) -> DecodeRows:
    """Sequence ``order[i]`` in row i, padding up to ``bucket``."""
    state = DecodeState(MAX_ROWS, MAX_BLOCKS, VOCAB, CPU)
    state.apply(
        [PlaceRow(row, 10 + seq, LENGTHS[seq], TABLES[seq], SAMPLING[seq], 100 + seq) for row, seq in enumerate(order)]
    )
    return state.rows(bucket)


def prefill_inputs(bucket: int) -> PrefillInputs:
    """A whole prompt, a chunk that begins in the middle of a block, and one that ends there."""
    draw = random.Random(1)

    def chunk(seq: int, start: int, stop: int) -> PrefillChunk:
        tokens = tuple(draw.randrange(3, 320) for _ in range(start, stop))
        return PrefillChunk(str(seq), start, tokens, TABLES[seq], SAMPLING[seq], 7 + seq, is_last=True, row=seq)

    buffer = PrefillBuffer(
        bucket,
        4,
        block_size=BLOCK_SIZE,
        max_blocks=MAX_BLOCKS,
        state=DecodeState(MAX_ROWS, MAX_BLOCKS, VOCAB, CPU),
        device=CPU,
    )
    buffer.fill([chunk(2, 0, 7), chunk(3, 6, 17), chunk(4, 21, 23)])
    return buffer.inputs


PREFILL_TOKENS = 7 + 11 + 2
PREFILL_SLOTS = {(seq, position) for seq, start, stop in ((2, 0, 7), (3, 6, 17), (4, 21, 23)) for position in
                 range(start, stop)}  # fmt: skip
DECODE_SLOTS = {(seq, length - 1) for seq, length in enumerate(LENGTHS)}

Step = Callable[[Weights, KVCache], tuple[Tensor, Tensor]]


def run_decode(weights: Weights, kv: KVCache, bucket: int = NUM_SEQS) -> tuple[Tensor, Tensor]:
    return decode_step(weights.spec, weights.params, kv, decode_rows(bucket))


def run_prefill(weights: Weights, kv: KVCache, bucket: int = PREFILL_TOKENS) -> tuple[Tensor, Tensor]:
    token_ids, logprobs = prefill_step(weights.spec, weights.params, kv, prefill_inputs(bucket))
    return token_ids[:3], logprobs[:3]


STEPS = pytest.mark.parametrize("step, slots", [(run_decode, DECODE_SLOTS), (run_prefill, PREFILL_SLOTS)])


def places(slots: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """(block, slot in it) of (sequence, position) pairs."""
    return {(TABLES[seq][position // BLOCK_SIZE], position % BLOCK_SIZE) for seq, position in slots}


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    assert ours[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(ours[1], expected[1], rtol=tolerance, atol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_compiles_without_a_break(weights: Weights, kind: str) -> None:
    """torch.compile(fullgraph=True) traces the whole step, and gives its tokens and its writes to the cache."""
    for backend in ("eager", "aot_eager") if weights.spec.qk_norm else ("eager",):  # the second one is slow
        kv = noisy_cache(weights.spec)
        again = copy_of(kv, weights.spec)
        torch._dynamo.reset()
        if kind == "decode":
            rows = decode_rows(7)
            expected = decode_step(weights.spec, weights.params, kv, rows)
            compiled = torch.compile(decode_step, fullgraph=True, backend=backend)
            ours = compiled(weights.spec, weights.params, again, rows)
        else:
            inputs = prefill_inputs(27)
            expected = prefill_step(weights.spec, weights.params, kv, inputs)
            compiled = torch.compile(prefill_step, fullgraph=True, backend=backend)
            ours = compiled(weights.spec, weights.params, again, inputs)
        assert_same(ours, expected)
        torch.testing.assert_close(again.blocks, kv.blocks)


def test_the_graph_can_be_printed(weights: Weights) -> None:
    """torch.export gives the decode step as one graph of our ops, whose attention is called once a layer."""
    spec = weights.spec
    kv = noisy_cache(spec)
    rows = decode_rows(7)

    class Module(torch.nn.Module):
        def forward(self, token_ids: Tensor, seq_lens: Tensor, block_tables: Tensor) -> tuple[Tensor, Tensor]:
            state = DecodeRows(token_ids, seq_lens, block_tables, rows.active, rows.sampling)
            return decode_step(spec, weights.params, kv, state)

    inputs = tuple(tensor.clone() for tensor in (rows.token_ids, rows.seq_lens, rows.block_tables))  # no views
    with torch.no_grad():
        text = torch.export.export(Module(), inputs).graph_module.print_readable(print_output=False)
    for op in ("paged_attention", "qk_norm_rope_store"):
        assert text.count(f"torch.ops.mini_infer.{op}.default(") == spec.num_layers
    assert text.count("torch.ops.mini_infer.sample.default(") == 1


@torch.inference_mode()
@STEPS
def test_only_its_own_slots(weights: Weights, step: Step, slots: set[tuple[int, int]]) -> None:
    """Bit for bit: K and V of every layer change at the step's own slots, all of them, and nowhere else."""
    kv = noisy_cache(weights.spec)
    before = kv.blocks.clone()
    step(weights, kv)
    changed = kv.blocks != before  # [layers, 2, blocks, heads, block_size, head_dim]
    for layer in range(weights.spec.num_layers):
        for index in range(2):
            at = changed[layer, index].any(dim=1).any(dim=-1)  # [blocks, block_size]
            assert {(int(block), int(slot)) for block, slot in at.nonzero()} == places(slots)


@torch.inference_mode()
def test_padded_rows_are_zeros(weights: Weights) -> None:
    """In every layer, where no product has a bias: what they leave in the null block says so."""
    kv = noisy_cache(weights.spec)
    decode_step(weights.spec, weights.params, kv, decode_rows(MAX_ROWS))
    biased = any(layer.qkv.bias is not None for layer in weights.params.layers)
    for keys, values in kv.layers:
        assert bool(keys[0, :, 0].any() or values[0, :, 0].any()) == biased


@torch.inference_mode()
@pytest.mark.parametrize("bucket", [NUM_SEQS + 1, MAX_ROWS])
def test_padded_rows_change_nothing(weights: Weights, bucket: int) -> None:
    """Padding writes to the null block only, and no real row's token or K/V depends on it."""
    kv = noisy_cache(weights.spec)
    padded = copy_of(kv, weights.spec)
    expected = run_decode(weights, kv)
    token_ids, logprobs = run_decode(weights, padded, bucket)
    assert_same((token_ids[:NUM_SEQS], logprobs[:NUM_SEQS]), expected)
    torch.testing.assert_close(padded.blocks[:, :, 1:], kv.blocks[:, :, 1:], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(logprobs).all()


@torch.inference_mode()
@pytest.mark.parametrize("bucket", [PREFILL_TOKENS + 1, PREFILL_TOKENS + 2 * MAX_BLOCKS * BLOCK_SIZE + 3])
def test_padding_tokens_change_nothing(weights: Weights, bucket: int) -> None:
    """The same for prefill, also when the padding is longer than one sequence may be."""
    kv = noisy_cache(weights.spec)
    padded = copy_of(kv, weights.spec)
    expected = run_prefill(weights, kv)
    assert_same(run_prefill(weights, padded, bucket), expected)
    torch.testing.assert_close(padded.blocks[:, :, 1:], kv.blocks[:, :, 1:], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@STEPS
@pytest.mark.parametrize("noise", [1e4, 1e30])
def test_noise_that_is_nobodys(weights: Weights, step: Step, slots: set[tuple[int, int]], noise: float) -> None:
    """What lies beyond every sequence's length, in blocks of nobody and in the null block changes no bit."""
    lengths = {seq: max((p + 1 for s, p in slots if s == seq), default=0) for seq in range(NUM_SEQS)}
    own = places({(seq, position) for seq, length in lengths.items() for position in range(length)})
    kv = noisy_cache(weights.spec)
    noisy = noisy_cache(weights.spec, seed=1, scale=noise)
    for block, slot in own:
        noisy.blocks[:, :, block, :, slot] = kv.blocks[:, :, block, :, slot]
    expected = step(weights, kv)
    ours = step(weights, noisy)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    for block, slot in own:
        assert torch.equal(noisy.blocks[:, :, block, :, slot], kv.blocks[:, :, block, :, slot])


@torch.inference_mode()
def test_the_last_layer_for_the_last_tokens(weights: Weights) -> None:
    """A prefill step, which takes no other tokens through its last layer, samples from the logits of all layers."""
    token_ids, logprobs = run_prefill(weights, noisy_cache(weights.spec))
    inputs = prefill_inputs(PREFILL_TOKENS)
    logits = prefill_logits(weights.spec, weights.params, noisy_cache(weights.spec), inputs)
    expected = logits[inputs.last_tokens[:3]].log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_an_mlp_in_pieces(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with more rows than go through an MLP at once gives what one with fewer gives."""
    expected = run_prefill(weights, noisy_cache(weights.spec))
    monkeypatch.setattr(decoder, "_MLP_ROWS", 10)
    assert_same(run_prefill(weights, noisy_cache(weights.spec)), expected)


def test_rows_in_any_order(weights: Weights) -> None:
    """A sequence's token depends on its own row's content, not on where the row is or who is beside it."""
    expected = run_decode(weights, noisy_cache(weights.spec))
    for order in ((4, 2, 0, 3, 1), (3,), (1, 4)):
        rows = decode_rows(len(order), order)
        token_ids, logprobs = decode_step(weights.spec, weights.params, noisy_cache(weights.spec), rows)
        picked = torch.tensor(order)
        assert_same((token_ids, logprobs), (expected[0][picked], expected[1][picked]))


@torch.inference_mode()
@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.9), SamplingParams(temperature=0.9, repetition_penalty=2.5)], ids=str
)
def test_prefill_then_decode_is_one_longer_prefill(weights: Weights, params: SamplingParams) -> None:
    """The two steps share one cache: a decode step after a prompt samples what a prompt longer by that token does."""
    draw = random.Random(3)
    tokens = tuple(draw.randrange(3, 320) for _ in range(18))
    table = (7, 3, 22, 9, 14)
    state = DecodeState(2, MAX_BLOCKS, VOCAB, CPU)

    def prefill(kv: KVCache, prompt: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        state.apply([PlaceRow(0, None, len(prompt) + 1, table, params, 5, History(prompt, ()))])
        buffer = PrefillBuffer(20, 1, block_size=BLOCK_SIZE, max_blocks=MAX_BLOCKS, state=state, device=CPU)
        buffer.fill([PrefillChunk("a", 0, prompt, table, params, 5, is_last=True, row=0)])
        token_ids, logprobs = prefill_step(weights.spec, weights.params, kv, buffer.inputs)
        return token_ids[:1], logprobs[:1]

    expected = prefill(noisy_cache(weights.spec), tokens)
    kv = noisy_cache(weights.spec)
    prefill(kv, tokens[:-1])
    state.apply([PlaceRow(0, tokens[-1], len(tokens), table, params, 5, History(tokens[:-1], ()))])
    assert_same(decode_step(weights.spec, weights.params, kv, state.rows(1)), expected)
