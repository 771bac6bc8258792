"""What holds for every op: names, registration, tracing, capture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mini_infer.kernels
import mini_infer.kernels.qkv_prologue
from mini_infer.kernels import (
    add_rmsnorm,
    apply_rotary_emb,
    paged_attention,
    paged_prefill_attention,
    rmsnorm,
    sample,
    silu_and_mul,
    store_kv,
)
from mini_infer.kernels.penalties import Penalties

ROOT = Path(mini_infer.kernels.__file__).resolve().parents[1]


def op_arguments(device, num_seqs=3, heads=4, kv_heads=2, head_dim=16, vocab=64):
    """Positional arguments of each op, by name."""

    def ints(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    generator = torch.Generator(device=device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    hidden = heads * head_dim
    caches = randn(9, kv_heads, 4, head_dim), randn(9, kv_heads, 4, head_dim)
    tables, lens = ints([[1, 2, 0], [3, 4, 5], [6, 0, 0]]), ints([7, 12, 1])
    q, k, v = randn(num_seqs, heads, head_dim), randn(num_seqs, kv_heads, head_dim), randn(num_seqs, kv_heads, head_dim)
    positions = ints([6, 11, 0], torch.int64)
    ones = torch.ones(num_seqs, device=device)
    return {
        "rmsnorm": (randn(num_seqs, hidden), randn(hidden), 1e-6),
        "add_rmsnorm": (randn(num_seqs, hidden), randn(num_seqs, hidden), randn(hidden), 1e-6),
        "apply_rotary_emb": (q, k, randn(20, head_dim // 2), randn(20, head_dim // 2), positions),
        "store_kv": (k, v, *caches, ints([10, 23, 24], torch.int64)),
        "qk_norm_rope_store": (
            randn(num_seqs, (heads + 2 * kv_heads) * head_dim),
            randn(head_dim),
            randn(head_dim),
            *(randn(20, head_dim // 2), randn(20, head_dim // 2)),
            positions,
            *caches,
            ints([10, 23, 24], torch.int64),
            heads,
            1e-6,
        ),
        "paged_attention": (q, *caches, tables, lens, 0.25, 0),
        "paged_prefill_attention": (randn(8, heads, head_dim), *caches, tables, lens, ints([0, 3, 7, 8]), 0.25, 5),
        "silu_and_mul": (randn(num_seqs, 2 * hidden),),
        "sample": (
            randn(num_seqs, vocab),
            ones * torch.arange(num_seqs, device=device),
            ints([-1, 10, -1]),
            ones * 0.9,
            ones * 0.01,
            positions,
            positions,
            (ones * 1.3, ones * 0.5, -ones, ints([1, -1, 0]), ints([[0, 1, 2, 5] * (vocab // 4)] * 2, torch.int16)),
        ),
    }


OPS = list(op_arguments("cpu"))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, device):
    torch.library.opcheck(getattr(torch.ops.mini_infer, name).default, op_arguments(device)[name])


def block(x, weight, qkv_weight, cos, sin, positions, key_cache, value_cache, slots, tables, lens, starts, sampling):
    """One function through every op."""
    normed, residual = add_rmsnorm(x, x, weight)
    q, k, v = (rmsnorm(normed, weight) @ qkv_weight).view(-1, 8, 16).split([4, 2, 2], 1)
    q, k = apply_rotary_emb(q, k, cos, sin, positions)
    store_kv(k, v, key_cache, value_cache, slots)
    out = paged_attention(q, key_cache, value_cache, tables, lens, sliding_window=6)
    out = out + paged_prefill_attention(q, key_cache, value_cache, tables, lens, starts)
    logits = silu_and_mul(torch.cat([out.flatten(1), residual], -1))
    *how, penalties = sampling
    return (*sample(logits, *how, Penalties(*penalties)), logits)


def block_arguments(device):
    ops = op_arguments(device)
    _, _, cos, sin, positions = ops["apply_rotary_emb"]
    _, _, key_cache, value_cache, slots = ops["store_kv"]
    tables, lens = ops["paged_attention"][3:5]
    x, weight, _ = ops["rmsnorm"]
    starts = torch.arange(4, dtype=torch.int32, device=device)
    qkv_weight = torch.randn(64, 8 * 16, device=device) / 8
    caches = key_cache.clone(), value_cache.clone()
    return x, weight, qkv_weight, cos, sin, positions, *caches, slots, tables, lens, starts, ops["sample"][1:]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_a_break(compiler, device):
    """torch.compile(fullgraph=True) gives the same outputs and the same writes to the cache."""
    torch.manual_seed(0)
    arguments = block_arguments(device)
    again = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    with torch.inference_mode():
        expected = block(*arguments)
        torch._dynamo.reset()
        out = torch.compile(block, fullgraph=True, backend=compiler)(*again)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(again[6:8], arguments[6:8])


def test_exports(device):
    """torch.export traces the ops as single calls."""

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return silu_and_mul(rmsnorm(x, weight))

    x, weight, _ = op_arguments(device)["rmsnorm"]
    graph = torch.export.export(Module(), (x, weight)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets == ["mini_infer.rmsnorm.default", "mini_infer.silu_and_mul.default"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_captured_in_a_cuda_graph(name):
    """Captured on some inputs, replayed on others written into the same addresses: what eager gives."""
    op = getattr(torch.ops.mini_infer, name).default
    static = op_arguments("cuda")[name]
    fresh = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in static)
    for a in fresh:
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            a.copy_(a.flip(0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*static)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*static)
    for a, b in zip(static, fresh, strict=True):
        if isinstance(a, torch.Tensor):
            a.copy_(b)
    graph.replay()
    expected = op(*fresh)
    torch.cuda.synchronize()
    as_tuple = [x if isinstance(x, tuple) else () if x is None else (x,) for x in (captured, expected)]
    for a, b in zip(*as_tuple, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(static, fresh, strict=True):  # store_kv writes its arguments
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


def test_block_on_the_gpu_equals_the_cpu(device):
    """All ops in a row, one device against the other."""
    torch.manual_seed(0)
    arguments = block_arguments("cpu")

    def move(a):
        return tuple(map(move, a)) if isinstance(a, tuple) else a.to(device)

    there = tuple(move(a) for a in arguments)
    expected = block(*arguments)
    out = block(*there)
    torch.testing.assert_close(out[2].cpu(), expected[2], atol=1e-4, rtol=1e-4)
    assert torch.equal(out[0].cpu(), expected[0])


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_names_are_functions_in_any_import_order():
    """Importing a submodule never hides an exported name."""
    run_python(
        "import mini_infer.kernels as kernels, importlib, pathlib\n"
        "files = pathlib.Path(kernels.__file__).resolve().parent.glob('*.py')\n"
        "stems = {file.stem for file in files} - {'__init__'}\n"
        "assert not stems & set(kernels.__all__), stems & set(kernels.__all__)\n"
        "for stem in stems: importlib.import_module(f'mini_infer.kernels.{stem}')\n"
        "for name in kernels.__all__: assert callable(getattr(kernels, name)), name\n"
        "assert set(kernels.__all__) <= set(dir(kernels))\n"
    )


def test_package_is_inert_as_top_level_kernels():
    """transformers finds this folder when it looks for its `kernels` package from the repository root."""
    run_python(
        "import sys, kernels\n"
        "assert not {'torch', 'triton', 'mini_infer'} & set(sys.modules)\n"
        "assert not hasattr(kernels, '__version__')\n"
    )


def test_importing_every_op_leaves_the_gpu_alone():
    run_python(
        "import mini_infer.kernels as kernels, torch\n"
        "[getattr(kernels, name) for name in kernels.__all__]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
