"""Sampling: exact sets, exact draws, the right distribution, one row's independence of the others."""

import functools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from mini_infer.kernels import philox_uniform, sample, sampling, sampling_candidates, sampling_wide
from mini_infer.kernels.sampling import _launch_sample
from mini_infer.kernels.sampling_cpu import kept_tokens_reference
from mini_infer.kernels.sampling_search import philox_uniform_of


def expand(rows, value, dtype, device):
    out = torch.as_tensor(value, dtype=dtype, device=device)
    return out.expand(rows).contiguous()


def run(backend, logits, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, seeds=0, positions=0):
    rows, device = logits.shape[0], logits.device
    return backend.pick(sample, _launch_sample)(
        logits,
        expand(rows, temperature, torch.float32, device),
        expand(rows, top_k, torch.int32, device),
        expand(rows, top_p, torch.float32, device),
        expand(rows, min_p, torch.float32, device),
        expand(rows, seeds, torch.int64, device),
        expand(rows, positions, torch.int64, device),
        () if backend.name == "interpreter" else None,  # no penalties
    )


def oracle_probs(logits, temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0):
    """The distribution to draw from, by sorting in float64."""
    x = logits.double().cpu().numpy() / temperature
    probs = np.exp(x - x.max())
    kept = np.ones(len(x), dtype=bool)
    if 0 < top_k < len(x):
        kept &= x >= np.sort(x)[::-1][top_k - 1]
    if top_p < 1.0:
        masses = np.sort(np.where(kept, probs, 0.0))[::-1]
        reached = np.cumsum(masses) >= top_p * masses.sum()
        kept &= probs >= masses[np.argmax(reached)]
    kept &= probs >= min(min_p, 1.0) * probs.max()
    probs = np.where(kept, probs, 0.0)
    return probs / probs.sum()


CUTS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.5},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.02, "temperature": 0.9},
]


def hard_logits(kind, vocab):
    generator = torch.Generator().manual_seed(vocab)
    x = torch.randn(vocab, generator=generator) * 3
    if kind == "ties":
        x = (x * 2).round() / 2  # many equal values, zeros of both signs among them
    if kind == "bfloat16":
        x = x.bfloat16()
    if kind == "masked":
        x[torch.randperm(vocab, generator=generator)[: vocab // 2]] = float("-inf")
    return x


@pytest.mark.parametrize("kind", ["plain", "ties", "bfloat16", "masked"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_kept_sets_on_the_cpu(kind, cuts):
    x = hard_logits(kind, 300)
    arguments = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0} | cuts
    weights, kept = kept_tokens_reference(x.float(), **arguments)
    assert torch.equal(kept & (weights > 0), torch.from_numpy(oracle_probs(x, **arguments) > 0))


@pytest.mark.parametrize("kind", ["plain", "ties", "bfloat16", "masked"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_draw_is_the_inverse_cdf(backend, kind, cuts):
    """Each token is the first whose cumulative probability, over the exact set, exceeds the row's uniform number."""
    rows = 3 if backend.small else 64
    x = hard_logits(kind, 300)
    seeds = torch.arange(rows) * 7919 + 11
    token_ids, logprobs = run(
        backend, x.expand(rows, -1).contiguous().to(backend.device), **cuts, seeds=seeds.to(backend.device), positions=3
    )
    cdf = np.cumsum(oracle_probs(x, **cuts))
    uniform = philox_uniform(seeds, torch.full_like(seeds, 3)).double().numpy()
    expected = torch.from_numpy(np.searchsorted(cdf, uniform, side="right"))
    assert torch.equal(token_ids.cpu(), expected)
    torch.testing.assert_close(logprobs.cpu().double(), x.double().log_softmax(-1)[expected], atol=1e-5, rtol=1e-5)


WIDE_VOCAB = 16_001  # more than the kernels' candidates, and two spans of a wide row


def wide_logits(kind):
    """Distributions that need different paths through the kernels; ids in the order of the logits but for "mixed"."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(WIDE_VOCAB, generator=generator).sort().values
    if "mixed" in kind:
        x = x[torch.randperm(WIDE_VOCAB, generator=generator)]
    if kind == "peaked":
        x[-1500:] += torch.linspace(4, 12, 1500)
    if kind == "ties":
        x = (x * 4).round() / 4
    if kind == "equal":
        x = torch.full_like(x, -2.5)
    if kind == "masked":
        x[: WIDE_VOCAB // 2] = float("-inf")
    return x.bfloat16() if kind == "bfloat16" else x


WIDE_KINDS = ["flat", "mixed", "peaked", "ties", "equal", "masked", "bfloat16"]
WIDE_CUTS = [
    {"top_k": 5},
    {"top_k": 1500},
    {"top_k": 12_000},
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 0.4},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.05},
    {"min_p": 1e-4, "temperature": 0.6},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 2000, "min_p": 0.01},
    {"top_k": 700, "top_p": 0.6},
    {"top_k": 9000, "top_p": 0.95, "min_p": 0.03},
    {"top_k": 9000, "top_p": 0.5, "min_p": 0.3, "temperature": 3.0},
]


@functools.cache
def seed_of_the_least_uniform():
    """A seed whose uniform number at position 0 is below nearly any token's share of the weight: it draws the first."""
    seeds = torch.arange(2_000_000)
    return int(philox_uniform(seeds, torch.zeros_like(seeds)).argmin())


@pytest.mark.parametrize("kind", [*WIDE_KINDS, "mixed, no room"])
def test_wide_rows(backend, monkeypatch, kind):
    """The first kept token, which for sorted logits is the last that the cuts keep; and draws from all of the set."""
    if "no room" in kind:  # for any list
        monkeypatch.setattr(sampling_wide, "LISTED", WIDE_VOCAB)
    x = wide_logits(kind)
    draws = 1 if backend.small else 7
    seeds = [seed_of_the_least_uniform(), *range(draws)] * len(WIDE_CUTS)
    each = [cuts for cuts in WIDE_CUTS for _ in range(draws + 1)]
    columns = {
        name: [cuts.get(name, default) for cuts in each]
        for name, default in (("temperature", 1.0), ("top_k", -1), ("top_p", 1.0), ("min_p", 0.0))
    }
    logits = x.expand(len(each), -1).contiguous().to(backend.device)
    token_ids, logprobs = run(backend, logits, **columns, seeds=seeds)
    uniform = philox_uniform(torch.tensor(seeds), torch.zeros(len(seeds), dtype=torch.int64)).tolist()
    for row, cuts in enumerate(each):
        token = int(token_ids[row])
        probs = oracle_probs(x, **cuts)
        assert probs[token] > 0, cuts
        first = int(np.flatnonzero(probs)[0])
        if probs[first] > 2 * uniform[row]:
            assert token == first, cuts
        cdf = np.cumsum(probs)
        assert cdf[token] - probs[token] - 5e-5 <= uniform[row] <= cdf[token] + 5e-5, cuts
    expected = x.double().log_softmax(-1)[token_ids.cpu()]
    torch.testing.assert_close(logprobs.cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_a_sample_that_misleads_leaves_a_short_list(backend, monkeypatch):
    """Nearly all weight is on tokens that the sample of a wide row has none of; the list still takes them."""
    if backend.name == "cpu":
        pytest.skip("nothing is sampled there")
    vocab = 1 << 16
    x = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1))
    x[0, 512::1024] = 11.0
    for other in range(1, 8):
        x[0, 512 + 32 * other :: 1024] = 11.0 + other / 8
    pivots = []

    def launch_candidates(*args):
        pivots.append(sampling_candidates.launch_candidates(*args))
        return pivots[0]

    monkeypatch.setattr(sampling, "launch_candidates", launch_candidates)
    token_ids, _ = run(backend, x.to(backend.device), top_p=0.99)
    assert x[0, token_ids[0]] >= 11.0
    keys = x[0].view(torch.int32)
    keys = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    threshold = int(torch.tensor(11.0).view(torch.int32))
    low = max(key for key in pivots[0][0].tolist() if key <= threshold)
    high = min((key for key in pivots[0][0].tolist() if key > threshold), default=(1 << 31) - 1)
    assert ((keys >= low) & (keys < high)).sum() <= vocab // sampling_wide.LISTED


@triton.jit
def _philox_test_kernel(seed_ptr, position_ptr, out_ptr):
    row = tl.program_id(0)
    tl.store(out_ptr + row, philox_uniform_of(tl.load(seed_ptr + row), tl.load(position_ptr + row)))


def test_philox_is_bit_equal_in_triton(backend):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789, 42, 42], device=backend.device)
    positions = torch.tensor([0, 0, 5, 2**31, 2**40, 77, 1, 2], device=backend.device)
    expected = philox_uniform(seeds, positions)
    assert ((expected >= 0) & (expected < 1)).all()
    assert expected.unique().numel() == len(seeds)
    if backend.name != "cpu":
        for dtype in (torch.int64, torch.int32):
            p = positions.clamp_max(2**31 - 1).to(dtype)
            out = torch.empty_like(expected)
            _philox_test_kernel[(len(seeds),)](seeds, p, out)
            assert torch.equal(out, philox_uniform(seeds, p))


def test_philox_known_answer():
    """Random123's philox4x32-10 test vector for counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert float(philox_uniform(zero, zero)) == (0x6627E8D5 >> 8) * 2.0**-24


def test_uniform_is_uniform():
    """By position under one seed, and by seed at one position."""
    n = torch.arange(20_000)
    for uniform in (philox_uniform(torch.zeros_like(n) + 5, n), philox_uniform(n, torch.zeros_like(n) + 5)):
        assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3


def test_distribution(backend):
    """Chi-squared of draws at successive positions against the exact probabilities."""
    if backend.small:
        pytest.skip("too many programs; the inverse-CDF test pins each draw")
    draws = 20_000 if backend.name == "cuda" else 6000
    x = torch.randn(40, device=backend.device) * 2
    cuts = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01}
    token_ids, _ = run(
        backend,
        x.expand(draws, -1).contiguous(),
        **cuts,
        seeds=123,
        positions=torch.arange(draws, device=backend.device),
    )
    probs = oracle_probs(x, **cuts)
    counts = np.bincount(token_ids.cpu().numpy(), minlength=40)
    assert counts[probs == 0].sum() == 0
    assert stats.chisquare(counts[probs > 0], draws * probs[probs > 0]).pvalue > 1e-3


@pytest.mark.parametrize("offset", [0.0, 1000.0, -20000.0, 20000.0])
@pytest.mark.parametrize("cuts", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.999}], ids=str)
def test_large_logits_lose_no_digits(backend, cuts, offset):
    """The log-probability is of the differences, however large what they are differences of."""
    x = (torch.arange(9000) % 7 / 8 + offset).repeat(2, 1).to(backend.device)  # each exact in float32
    token_ids, logprobs = run(backend, x, **cuts)
    expected = x.double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("vocab", [50, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_greedy(backend, vocab, dtype):
    """The lowest index of equals, at every place of a chunk; the cuts are not looked at."""
    x = torch.randn(5, vocab, device=backend.device).to(dtype)
    best = [0, vocab - 1, vocab // 2, 7, vocab // 3]
    for row, index in enumerate(best):
        x[row, index:] = torch.where(torch.arange(vocab - index, device=backend.device) % 11 == 0, 9.0, x[row, index:])
    token_ids, logprobs = run(backend, x, temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)
    assert token_ids.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    assert token_ids.tolist() == best
    expected = x.double().log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [2500, 9001])  # two chunks; wide rows
def test_row_does_not_depend_on_the_batch(backend, vocab):
    """Greedy, plain and cut rows, alone and together: bit-equal."""
    x = torch.randn(5, vocab, device=backend.device) * 2
    each = {
        "temperature": [0.0, 1.0, 0.8, 1.2, 1.0],
        "top_k": [-1, -1, 20, -1, 50],
        "top_p": [1.0, 1.0, 1.0, 0.9, 0.7],
        "min_p": [0.0, 0.0, 0.0, 0.0, 0.01],
        "seeds": [1, 2, 3, 4, 2**62],
        "positions": [9, 8, 7, 6, 5],
    }
    together = run(backend, x, **each)
    for row in range(5):
        alone = run(backend, x[row : row + 1], **{name: values[row] for name, values in each.items()})
        assert int(alone[0]) == int(together[0][row])
        assert torch.equal(alone[1].view(torch.int32), together[1][row : row + 1].view(torch.int32))
    backwards = run(backend, x.flip(0), **{name: values[::-1] for name, values in each.items()})
    assert backwards[0].tolist() == together[0].tolist()[::-1]


def test_no_distribution_gives_nan(backend):
    """NaN, +inf or nothing but -inf: NaN logprob, some token of the vocabulary; the other rows are as without them."""
    x = torch.randn(6, 70, device=backend.device)
    x[0, 3] = float("nan")
    x[1] = float("nan")
    x[2, 69] = float("inf")
    x[3] = float("-inf")
    x[5, 10:] = float("-inf")
    for temperature in (0.0, 1.0):
        token_ids, logprobs = run(backend, x, temperature=temperature, top_k=20, top_p=0.9)
        assert logprobs.isnan().tolist() == [True, True, True, True, False, False]
        assert ((token_ids >= 0) & (token_ids < 70)).all()
        assert int(token_ids[5]) < 10
        assert torch.equal(run(backend, x[4:], temperature=temperature, top_k=20, top_p=0.9)[0], token_ids[4:])


def test_low_temperature_is_nearly_greedy(backend):
    x = torch.randn(4, 100, device=backend.device)
    for temperature in (1e-3, 1e-30):
        token_ids, _ = run(backend, x, temperature=temperature, seeds=[1, 2, 3, 4])
        assert torch.equal(token_ids, x.argmax(-1))


def test_the_last_token_can_be_drawn(backend):
    """All the weight at the end of the vocabulary, and the largest uniform number found among some seeds."""
    seeds = torch.arange(20_000)
    seed = int(philox_uniform(seeds, torch.zeros_like(seeds)).argmax())
    x = torch.zeros(1, 3000, device=backend.device)
    assert int(run(backend, x, seeds=seed)[0]) == int(3000 * philox_uniform(torch.tensor([seed]), torch.tensor([0])))
    x[0, :2999] = -50.0
    assert int(run(backend, x, seeds=seed)[0]) == 2999


@pytest.mark.gpu
def test_large_vocabulary_agrees_with_the_cpu():
    x = torch.randn(64, 151_936) * 3
    cuts = {
        "temperature": [0.0, 1.0, 0.6, 1.0] * 16,
        "top_k": [-1, 50, -1, -1] * 16,
        "top_p": [1.0, 1.0, 0.95, 0.9] * 16,
        "min_p": [0.0, 0.0, 0.0, 0.05] * 16,
        "seeds": list(range(64)),
        "positions": list(range(64)),
    }
    names = [
        ("temperature", torch.float32),
        ("top_k", torch.int32),
        ("top_p", torch.float32),
        ("min_p", torch.float32),
        ("seeds", torch.int64),
        ("positions", torch.int64),
    ]
    arguments = [torch.tensor(cuts[name], dtype=dtype) for name, dtype in names]
    on_cpu = sample(x, *arguments)
    on_gpu = sample(x.cuda(), *(argument.cuda() for argument in arguments))
    assert int((on_cpu[0] != on_gpu[0].cpu()).sum()) <= 1  # float32 against float64 sums at a boundary
    assert on_gpu[0].cpu()[::4].equal(on_cpu[0][::4])


def test_bad_arguments():
    x, f, i, s = torch.zeros(2, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"temperature must be torch.float32 \[2\]"):
        sample(x, f[:1], i, f, f, s, s)
    with pytest.raises(ValueError, match=r"top_k must be torch.int32 \[2\]"):
        sample(x, f, s, f, f, s, s)
    with pytest.raises(ValueError, match="positions must be int32 or int64"):
        sample(x, f, i, f, f, s, f)
    with pytest.raises(ValueError, match=r"logits must be \[rows, vocab\]"):
        sample(x[0], f, i, f, f, s, s)
