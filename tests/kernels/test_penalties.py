"""Penalties on tokens that a sequence has seen: the formula, which logits change, and the counts."""

import numpy as np
import pytest
import torch

from mini_infer.kernels import sample
from mini_infer.kernels.penalties import MAX_COUNT, Penalties, count_tokens_cpu, token_counts_of
from mini_infer.kernels.sampling import _launch_sample


def random_penalties(rows, vocab, device, count_rows):
    """Counts of many values, in a view with room beside the rows."""
    generator = torch.Generator().manual_seed(vocab)

    def uniform(low, high):
        return (torch.rand(rows, generator=generator) * (high - low) + low).to(device)

    counts = torch.randint(0, 7, (max(count_rows) + 1, vocab + 16), generator=generator).short()
    counts[:, :vocab][torch.rand(counts[:, :vocab].shape, generator=generator) < 0.6] = 0
    counts[:, :3] = torch.tensor([1, 2 * MAX_COUNT, 2 * MAX_COUNT + 1], dtype=torch.int16)[:vocab]
    return Penalties(
        uniform(0.5, 2.0),
        uniform(-2.0, 2.0),
        uniform(0.0, 2.0),
        torch.tensor(count_rows, dtype=torch.int32, device=device),
        counts.to(device)[:, :vocab],
    )


def expected_logits(logits, penalties):
    """The formula in float64; NaN where nothing is to change."""
    x = logits.double().cpu()
    out = torch.full_like(x, float("nan"))
    for row, source in enumerate(penalties.count_rows.tolist()):
        if source >= 0:
            seen = penalties.token_counts[source].cpu()
            count = (seen >> 1).double()
            repetition = float(penalties.repetition[row])
            value = torch.where(x[row] > 0, x[row] / repetition, x[row] * repetition)
            value -= float(penalties.frequency[row]) * count + float(penalties.presence[row]) * (count > 0)
            out[row] = torch.where(seen > 0, value, float("nan"))
    return out


def run(backend, logits, penalties, temperature=0.0, **cuts):
    rows, device = logits.shape[0], logits.device
    positions = torch.arange(rows, device=device)
    arguments = (
        torch.full((rows,), temperature, device=device),
        torch.full((rows,), cuts.get("top_k", -1), dtype=torch.int32, device=device),
        torch.full((rows,), cuts.get("top_p", 1.0), device=device),
        torch.zeros(rows, device=device),
        positions + 5,
        positions,
    )
    if backend.name == "interpreter":
        return _launch_sample(logits, *arguments, penalties or ())
    return sample(logits, *arguments, penalties)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [3, 2048, 4500])
def test_formula(backend, vocab, dtype):
    """Seen tokens change as the formula says, rounded to their type; the others keep their bits, -inf among them."""
    logits = (torch.randn(4, vocab, device=backend.device) * 6).to(dtype)
    logits[:, vocab // 2 :: 97] = float("-inf")
    logits[0, 0] = 0.0
    before = logits.clone()
    penalties = random_penalties(4, vocab, backend.device, [2, -1, 0, 1])
    token_ids, logprobs = run(backend, logits, penalties)
    expected = expected_logits(before, penalties)
    same = expected.isnan()
    assert same[1].all() and (vocab == 3 or same.any(1).all())
    assert torch.equal(logits.cpu()[same], before.cpu()[same])
    changed = ~same & expected.isfinite()
    precision = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(logits.cpu()[changed].double(), expected[changed], rtol=precision, atol=precision)
    assert bool((logits.cpu()[~same & ~changed] == float("-inf")).all())
    assert torch.equal(token_ids, logits.argmax(-1))
    chosen = logits.double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), chosen, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 9}, {"top_p": 0.7}, {"top_k": 3000, "top_p": 0.99}], ids=str)
def test_draws_come_from_penalized_logits(backend, cuts):
    """Whatever way a row takes through the sampler: the draw is that of logits which were penalized beforehand."""
    rows, vocab = 3, 9000
    logits = torch.randn(rows, vocab, device=backend.device)
    penalties = random_penalties(rows, vocab, backend.device, [0, -1, 1])
    penalties = penalties._replace(frequency=penalties.frequency * 1e-3)
    token_ids, logprobs = run(backend, logits, penalties, temperature=0.9, **cuts)
    again = run(backend, logits.clone(), None, temperature=0.9, **cuts)  # of what they have become
    assert torch.equal(token_ids, again[0])
    torch.testing.assert_close(logprobs, again[1])


def test_counting():
    """From a prompt and outputs, and then token by token: the same counts; they stop where 15 bits end."""
    draw = np.random.default_rng(0)
    prompt, outputs = draw.integers(0, 30, 25).tolist(), draw.integers(0, 30, 60).tolist()
    counts = torch.from_numpy(np.stack([token_counts_of([], [], 30), token_counts_of(prompt, [], 30)]))
    for token in outputs:
        count_tokens_cpu(torch.tensor([token, 0, token]), torch.tensor([1, -1, 0], dtype=torch.int32), counts)
    for row, seen in enumerate(([], prompt)):
        assert counts[row].tolist() == [2 * outputs.count(token) + (token in seen) for token in range(30)]
        assert np.array_equal(counts[row].numpy(), token_counts_of(seen, outputs, 30))
    assert token_counts_of([0], [0] * (MAX_COUNT + 9), 2).tolist() == [2 * MAX_COUNT + 1, 0]
    full = torch.tensor([[2 * MAX_COUNT, 2 * MAX_COUNT + 1]], dtype=torch.int16)
    for token in (0, 1):
        count_tokens_cpu(torch.tensor([token]), torch.tensor([0], dtype=torch.int32), full)
    assert full.tolist() == [[2 * MAX_COUNT, 2 * MAX_COUNT + 1]]


def test_bad_arguments():
    """Wrong shapes and types are named."""
    f, i, s = torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    good = Penalties(f, f, f, i, torch.zeros(2, 8, dtype=torch.int16))
    for name, value, message in (
        ("repetition", f[:1], r"repetition must be torch.float32 \[2\]"),
        ("count_rows", s, r"count_rows must be torch.int32 \[2\]"),
        ("token_counts", torch.zeros(2, 7, dtype=torch.int16), r"token_counts must be int16 \[count rows, 8\]"),
        ("token_counts", torch.zeros(2, 8), "token_counts must be int16"),
        ("presence", torch.zeros(2, device="meta"), "on the device of logits"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(torch.zeros(2, 8), f, i, f, f, s, s, good._replace(**{name: value}))
