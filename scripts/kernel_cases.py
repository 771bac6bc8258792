"""The ops of `bench_kernels.py` at the shapes of real models, each with the formula in plain torch ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_infer.kernels import (
    add_rmsnorm,
    apply_rotary_emb,
    paged_attention,
    paged_prefill_attention,
    prepare_qkv,
    rmsnorm,
    sample,
    silu_and_mul,
    store_kv,
)
from mini_infer.kernels.linear import LinearWeight, add_linear, norm_linear, with_tiles
from mini_infer.kernels.linear_plan import LinearPlan, Role
from mini_infer.kernels.penalties import Penalties

EPS = 1e-6
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
COLD_BYTES = 256 << 20  # several times the L2 cache of any GPU there is


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: Name of the op.
        shape: The shape, for people.
        ours, plain: The op, and the formula in torch ops. They take the number of the call, to choose among copies of
            what should not be in the cache.
        bytes: The fewest bytes that must be read and written.
        flops: Operations of the tensor cores; 0 for an op that is bound by memory.
    """

    op: str
    shape: str
    ours: Callable[[int], object]
    plain: Callable[[int], object]
    bytes: float
    flops: float = 0.0


def randn(*shape: int) -> Tensor:
    """Normal bfloat16 values on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.float32).bfloat16()


def size(*tensors: Tensor) -> float:
    """Bytes of tensors."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def plain_rmsnorm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RoPE; cos and sin in the type of q, [tokens, 1, head_dim], or by positions [max_positions, 1, head_dim]."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]

    def rotated(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat((-x2, x1), -1) * sin

    return rotated(q), rotated(k)


def plain_sample(logits: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Top-k and top-p by sorting, min-p, then a draw."""
    scaled = logits.float() / temperature[:, None]
    if top_k > 0:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k, -1).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, index = scaled.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        dropped = probs.cumsum(-1) - probs >= top_p
        scaled = ordered.masked_fill(dropped, float("-inf")).gather(-1, index.argsort(-1))
    if min_p > 0.0:
        scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + math.log(min_p), float("-inf"))
    return torch.multinomial(scaled.softmax(-1), 1)


def norm_cases() -> Iterator[Case]:
    """RMSNorm, alone and with the residual."""
    for rows, hidden in ((1, 4096), (64, 4096), (256, 4096), (256, 1024), (8192, 4096), (8192, 1024)):
        yield from norm_case(rows, hidden)


def norm_case(rows: int, hidden: int) -> tuple[Case, Case]:
    """Both at one shape."""
    x, residual, weight = randn(rows, hidden), randn(rows, hidden), randn(hidden)
    shape = f"{rows} x {hidden}"
    alone = Case("rmsnorm", shape, lambda _: rmsnorm(x, weight, EPS), lambda _: plain_rmsnorm(x, weight), 2 * size(x))
    with_residual = Case(
        "add_rmsnorm",
        shape,
        lambda _: add_rmsnorm(x, residual, weight, EPS),
        lambda _: (plain_rmsnorm(x + residual, weight), x + residual),
        4 * size(x),
    )
    return alone, with_residual


def rope_cases() -> Iterator[Case]:
    """RoPE, the write to the cache, and what the engine runs in their place: norm, RoPE and the write as one."""
    for tokens, heads in ((1, 32), (64, 32), (256, 32), (256, 16), (8192, 32)):
        yield from rope_case(tokens, heads)


def rope_case(tokens: int, heads: int) -> tuple[Case, Case, Case, Case]:
    """All at one shape; RoPE against the formula with and without the look-up of the tokens' cos and sin."""
    qkv = randn(tokens, (heads + 2 * KV_HEADS) * HEAD_DIM)
    parts = qkv.split([n * HEAD_DIM for n in (heads, KV_HEADS, KV_HEADS)], -1)
    q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)) for part in parts)
    cos, sin = torch.rand(2, 8192, HEAD_DIM // 2, device="cuda")
    positions = torch.arange(tokens, device="cuda")
    all_cos, all_sin = (torch.cat((table, table), -1)[:, None].bfloat16() for table in (cos, sin))
    wide_cos, wide_sin = all_cos[positions], all_sin[positions]
    pool = randn(2, tokens // BLOCK_SIZE + 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    slots, norm = positions + BLOCK_SIZE, randn(HEAD_DIM)
    shape = f"{tokens} x ({heads} + {KV_HEADS}) x {HEAD_DIM}"

    def rotate(_: int) -> tuple[Tensor, Tensor]:
        return apply_rotary_emb(q, k, cos, sin, positions)

    rope = Case("rope", shape, rotate, lambda _: plain_rope(q, k, all_cos, all_sin, positions), 2 * size(q, k))
    looked_up = Case(
        "rope, looked up before", shape, rotate, lambda _: plain_rope(q, k, wide_cos, wide_sin), rope.bytes
    )
    store = Case(
        "store_kv",
        f"{tokens} x 2 x {KV_HEADS} x {HEAD_DIM}",
        lambda _: store_kv(k, v, pool[0], pool[1], slots),
        lambda _: plain_store(k, v, pool, slots),
        2 * size(k, v),
    )
    all_three = Case(
        "prepare_qkv",
        f"{tokens} x ({heads} + 2 x {KV_HEADS}) x {HEAD_DIM}",
        lambda _: prepare_qkv(qkv, norm, norm, cos, sin, positions, pool[0], pool[1], slots, heads, EPS),
        lambda _: plain_prepare(q, k, v, norm, wide_cos, wide_sin, pool, slots),
        2 * size(qkv),
    )
    return rope, looked_up, store, all_three


def plain_store(k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> None:
    """K and V to their slots."""
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    pool[0, blocks, :, offsets] = k
    pool[1, blocks, :, offsets] = v


def plain_prepare(
    q: Tensor, k: Tensor, v: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, slots: Tensor
) -> Tensor:
    """q/k norm, RoPE, K and V to their slots."""
    q, k = plain_rope(plain_rmsnorm(q, norm), plain_rmsnorm(k, norm), cos, sin)
    plain_store(k, v, pool, slots)
    return q


def activation_cases() -> Iterator[Case]:
    """The gated activation."""
    for rows, inner in ((1, 14336), (256, 14336), (256, 3072), (8192, 14336)):
        yield activation_case(rows, inner)


def activation_case(rows: int, inner: int) -> Case:
    """One shape."""
    x = randn(rows, 2 * inner)
    return Case(
        "silu_and_mul",
        f"{rows} x 2 x {inner}",
        lambda _: silu_and_mul(x),
        lambda _: F.silu(x[:, :inner]) * x[:, inner:],
        1.5 * size(x),
    )


def linear_cases() -> Iterator[Case]:
    """The products as the plan does them, against cuBLAS with the plain formulas beside it; cold weights."""
    plan = LinearPlan.for_gpu(torch.cuda.get_device_name())
    shapes: tuple[tuple[str, int, int, Role], ...] = (
        ("8B qkv", 6144, 4096, "norm"),
        ("8B o", 4096, 4096, "add"),
        ("8B gate_up", 28672, 4096, "norm_gate"),
        ("8B down", 4096, 14336, "add"),
        ("0.6B qkv", 4096, 1024, "norm"),
        ("0.6B o", 1024, 2048, "add"),
        ("0.6B gate_up", 6144, 1024, "norm_gate"),
        ("0.6B down", 1024, 3072, "add"),
    )
    for name, n, k, role in shapes:
        copies = max(2, -(-COLD_BYTES // (2 * n * k)))
        weights = [randn(n, k) / math.sqrt(k) for _ in range(copies)]
        planned = [with_tiles(LinearWeight.from_tensors(weight), plan, role) for weight in weights]
        for rows in (1, 8, 64, 256):
            x, residual = randn(rows, k), randn(rows, n)
            ours, plain = product(role, x, residual, planned, weights)
            yield Case(
                f"{role} product", f"{name} {rows} x {n} x {k}", ours, plain, size(weights[0]), 2.0 * rows * n * k
            )


def product(
    role: Role, x: Tensor, residual: Tensor, planned: Sequence[LinearWeight], weights: Sequence[Tensor]
) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """(ours, plain) for one role. The norm's weight is in ours already."""
    norm, squares = torch.ones_like(x[0]), x.float().square().view(len(x), -1, 64).sum(-1).t().contiguous()
    if role == "add":

        def add(i: int) -> None:
            add_linear(residual, x, planned[i % len(planned)])

        return add, lambda i: residual + F.linear(x, weights[i % len(weights)])

    def normed(i: int) -> Tensor:
        return norm_linear(x, squares, EPS, planned[i % len(planned)], gated=role == "norm_gate")

    def plain(i: int) -> Tensor:
        out = F.linear(plain_rmsnorm(x, norm), weights[i % len(weights)])
        if role == "norm":
            return out
        gate, up = out.chunk(2, -1)
        return F.silu(gate) * up

    return normed, plain


def attention_cases() -> Iterator[Case]:
    """Decode and prefill attention over a shuffled pool, against the library's attention over gathered K and V."""
    for rows, context in ((1, 1024), (64, 1024), (64, 4096), (256, 1024)):
        yield decode_case(rows, context)
    for seqs, length in ((4, 2048), (1, 8192)):
        yield prefill_case(seqs, length)


def shuffled_pool(seqs: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(K and V [2, num_blocks, ...], block tables, lengths) of sequences of one length."""
    blocks = length // BLOCK_SIZE
    pool = randn(2, seqs * blocks + 1, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    tables = (torch.randperm(seqs * blocks, device="cuda") + 1).int().view(seqs, blocks)
    return pool, tables, torch.full((seqs,), length, dtype=torch.int32, device="cuda")


def decode_case(rows: int, context: int) -> Case:
    """One token a row."""
    (pool, tables, lens), query = shuffled_pool(rows, context), randn(rows, HEADS, HEAD_DIM)
    return Case(
        "paged_attention",
        f"{rows} x {context}",
        lambda _: paged_attention(query, pool[0], pool[1], tables, lens),
        lambda _: plain_attention(query[:, :, None], pool, tables, causal=False),
        rows * context * KV_HEADS * HEAD_DIM * 4.0,
    )


def prefill_case(seqs: int, length: int) -> Case:
    """Whole prompts."""
    (pool, tables, lens), query = shuffled_pool(seqs, length), randn(seqs * length, HEADS, HEAD_DIM)
    starts = torch.arange(seqs + 1, device="cuda", dtype=torch.int32) * length
    by_seq = query.unflatten(0, (seqs, length)).transpose(1, 2)
    return Case(
        "paged_prefill_attention",
        f"{seqs} x {length}",
        lambda _: paged_prefill_attention(query, pool[0], pool[1], tables, lens, starts),
        lambda _: plain_attention(by_seq, pool, tables, causal=True),
        2 * size(query),
        2 * 2 * HEAD_DIM * HEADS * seqs * length**2 / 2,
    )


def plain_attention(query: Tensor, pool: Tensor, tables: Tensor, *, causal: bool) -> Tensor:
    """query [rows, heads, tokens, head_dim]; K and V gathered from the pool."""
    key, value = (cache[tables.long()].transpose(1, 2).flatten(2, 3) for cache in pool)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


@dataclass(frozen=True)
class Cuts:
    """How to sample a row."""

    temperature: float = 0.6
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0


def sampling_cases() -> Iterator[Case]:
    """256 rows of a large vocabulary: with few likely tokens, as a language model has them, and with very many."""
    flat = randn(256, 151936)
    peaked = flat.clone()
    peaked[:, torch.randperm(flat.shape[1], device="cuda")[:100]] += torch.linspace(
        4, 12, 100, device="cuda"
    ).bfloat16()
    settings = {
        "greedy": Cuts(temperature=0.0),
        "all": Cuts(),
        "k 50": Cuts(top_k=50),
        "p 0.9": Cuts(top_p=0.9),
        "min-p 0.05": Cuts(min_p=0.05),
        "k 50, p 0.9": Cuts(top_k=50, top_p=0.9),
    }
    for name, logits in (("peaked", peaked), ("flat", flat)):
        for setting, cuts in settings.items():
            yield sampling_case(f"{name}, {setting}", logits, [cuts])
    yield sampling_case("peaked, mixed", peaked, list(settings.values()))
    yield sampling_case("flat, k 5000", flat, [Cuts(top_k=5000)])
    yield sampling_case("32 of them flat, p 0.9", flat, [*[Cuts(temperature=0.0)] * 7, Cuts(top_p=0.9)])
    yield penalty_case(peaked)


def sampling_case(name: str, logits: Tensor, cuts: Sequence[Cuts]) -> Case:
    """Rows with these cuts in turn; the plain ops cut all rows like the last."""
    rows, vocab = logits.shape
    seeds = torch.arange(rows, device="cuda")
    each = [cuts[row % len(cuts)] for row in range(rows)]
    temperature = torch.tensor([cut.temperature for cut in each], device="cuda")
    top_k = torch.tensor([cut.top_k for cut in each], dtype=torch.int32, device="cuda")
    top_p = torch.tensor([cut.top_p for cut in each], device="cuda")
    min_p = torch.tensor([cut.min_p for cut in each], device="cuda")
    last = cuts[-1]

    def plain(_: int) -> Tensor:
        if last.temperature == 0.0:
            return logits.argmax(-1)
        heat = torch.full_like(temperature, last.temperature)
        return plain_sample(logits, heat, last.top_k, last.top_p, last.min_p)

    return Case(
        "sample",
        f"{rows} x {vocab} {name}",
        lambda _: sample(logits, temperature, top_k, top_p, min_p, seeds, seeds),
        plain,
        size(logits),
    )


def penalty_case(logits: Tensor) -> Case:
    """Greedy rows with penalties, of a strength that changes nothing: the logits are penalized in place every time."""
    rows, vocab = logits.shape
    zero, one = torch.zeros(rows, device="cuda"), torch.ones(rows, device="cuda")
    row_ids = torch.arange(rows, dtype=torch.int32, device="cuda")
    every, seeds = torch.full_like(row_ids, -1), row_ids.long()
    counts = torch.zeros(rows, vocab, dtype=torch.int16, device="cuda")
    counts[:, torch.randperm(vocab, device="cuda")[:1000]] = 3
    penalties = Penalties(one, zero, zero, row_ids, counts)

    def plain(_: int) -> Tensor:
        x = logits.float()
        x = torch.where(counts > 0, torch.where(x > 0, x / one[:, None], x * one[:, None]), x)
        count = counts >> 1
        return (x - zero[:, None] * count - zero[:, None] * (count > 0)).argmax(-1)

    return Case(
        "sample",
        f"{rows} x {vocab} peaked, greedy, penalties",
        lambda _: sample(logits, zero, every, one, zero, seeds, seeds, penalties),
        plain,
        size(logits) + size(counts),
    )


OPS: dict[str, tuple[Callable[[], Iterator[Case]], tuple[str, ...]]] = {
    "rmsnorm": (norm_cases, ("test_norm.py",)),
    "rope": (rope_cases, ("test_rotary.py", "test_qkv_prologue.py", "test_kv_store.py")),
    "silu": (activation_cases, ("test_activation.py",)),
    "linear": (linear_cases, ("test_linear.py", "test_skinny_linear.py", "test_linear_hopper.py")),
    "attention": (
        attention_cases,
        ("test_attention_decode.py", "test_attention_prefill.py", "test_attention_prefill_hopper.py"),
    ),
    "sampling": (sampling_cases, ("test_sampling.py", "test_penalties.py")),
}
