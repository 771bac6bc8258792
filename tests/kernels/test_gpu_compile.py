"""Every kernel compiles for sm_90 on a machine without a GPU: the compiler refuses more than the interpreter does."""

import pytest
import torch

from tests.kernels.stub_driver import PREAMBLE, run_without_gpu

CODE = (
    PREAMBLE
    + """
import dataclasses
names, persistent = [], []

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    names.append(kernel.metadata.name)
    persistent.append(kwargs.get("PERSISTENT", False))
    assert kernel.metadata.shared <= 227 * 1024, (names[-1], kernel.metadata.shared)
    return kernel

JITFunction.run = compile_only
from mini_infer.kernels import activation, attention_decode, attention_prefill, block_copy, decode_frame, kv_store, norm
from mini_infer.kernels import qkv_prologue, rotary, sampling, skinny_linear
from mini_infer.kernels.linear_plan import Tile

ints = lambda *values: torch.tensor(values, dtype=torch.int32)
x = torch.randn(4, 2048).bfloat16()
norm._launch_rmsnorm(x, x[0], 1e-6)
norm._launch_rmsnorm(x, None, 1e-6)
norm._launch_add_rmsnorm(x, x, x[0], 1e-6)
activation._launch_silu_and_mul(x)
activation._launch_normed_silu_and_mul(x, torch.ones(16, 4), 2048, 1e-6)
q, k = torch.randn(4, 8, 128).bfloat16(), torch.randn(4, 2, 128).bfloat16()
cache, slots = torch.randn(9, 2, 16, 128).bfloat16(), torch.arange(4)
tables, lens = torch.ones(4, 40).int(), ints(1, 1, 1, 1)
rotary._launch_rotary(q, k, torch.randn(9, 64), torch.randn(9, 64), slots)
kv_store._launch_store_kv(k, k, cache, cache, slots)
for window in (0, 100):
    attention_decode._launch_paged_attention(q, cache, cache, tables, lens, 0.1, window)
    for config in (None, attention_prefill.prefill_config(128, 2)):  # on Hopper's kernel, and on the other
        starts = ints(0, 1, 2, 3, 4)
        attention_prefill._launch_paged_prefill_attention(
            q, cache, cache, tables, lens, starts, 0.1, window, config=config
        )
attention_prefill._launch_paged_prefill_attention(q[:1], cache, cache, tables[:1], lens[:1], ints(0, 1), 0.1, 0)
for dtype, dim in ((torch.float32, 8), (torch.bfloat16, 8), (torch.float32, 128), (torch.bfloat16, 256)):
    q, cache = torch.randn(4, 6, dim).to(dtype), torch.randn(9, 2, 16, dim).to(dtype)
    attention_decode._launch_paged_attention(q, cache, cache, tables, lens, 0.1, 0)
    attention_prefill._launch_paged_prefill_attention(q, cache, cache, tables, lens, ints(0, 1, 2, 3, 4), 0.1, 0)
    table, weight, qkv = torch.randn(9, dim // 2), q[0, 0], torch.randn(4, 10 * dim).to(dtype)
    for norm_weight in (None, weight):
        qkv_prologue._launch_prepare_qkv(
            qkv, norm_weight, norm_weight, table, table, slots, cache, cache, slots, 6, 1e-6
        )
h, w, r = torch.randn(4, 256).bfloat16(), torch.randn(64, 256).bfloat16(), torch.randn(4, 64).bfloat16()
for gated in (False, True):
    skinny_linear.launch_skinny_linear(h, w, None, Tile("gemv", 2, 256, 4, norms=True), gated=gated, eps=1e-6)
    skinny_linear.launch_skinny_linear(h, w, None, Tile("dot", 16, 64, 2, 3, norms=True), gated=gated, eps=1e-6)
for tile in (Tile("gemv", 2, 64, 4, 3), Tile("dot", 16, 64, 2, 3), Tile("dot", 16, 64, 2, 3, split_k=2)):
    skinny_linear.launch_add_linear(r, h, w, w[:, 0].contiguous(), tile)
    if tile.kind == "dot":
        skinny_linear.launch_add_linear(r, h, w, None, dataclasses.replace(tile, leaves=True))
h = torch.randn(40, 256).bfloat16()
for tile in (Tile("tma", 128, 64, 4, 3, block_m=16), Tile("tma", 128, 64, 8, 3, block_m=64, split_k=2)):
    for gated in (False, True):
        skinny_linear.launch_skinny_linear(h, w, None, tile, gated=gated)
    for leaves in (False, True):
        tile = dataclasses.replace(tile, leaves=leaves)
        skinny_linear.launch_add_linear(torch.randn(40, 64).bfloat16(), h, w, None, tile)
for gated in (False, True):
    tile = Tile("tma", 128, 64, 4, 3, block_m=64, norms=True)
    skinny_linear.launch_skinny_linear(h, w, None, tile, gated=gated, eps=1e-6, squares=torch.ones(4, 40))
tile = Tile("hopper", 64, 64, 4, 3, block_m=64)
skinny_linear.launch_skinny_linear(h, w, w[:, 0].contiguous(), tile, gated=True)
skinny_linear.launch_skinny_linear(
    h, w, None, dataclasses.replace(tile, norms=True), gated=False, eps=1e-6, squares=torch.ones(4, 40)
)
for leaves in (False, True):
    tile = dataclasses.replace(tile, leaves=leaves)
    skinny_linear.launch_add_linear(torch.randn(40, 64).bfloat16(), h, w, None, tile)
tile = Tile("hopper", 128, 64, 8, 4, split_k=4, block_m=256)  # as many registers as there are
skinny_linear.launch_add_linear(torch.randn(40, 64).bfloat16(), h, w, None, tile)
tile = Tile("hopper", 256, 64, 8, 3, norms=True, block_m=128)
skinny_linear.launch_skinny_linear(h, w, None, tile, gated=True, eps=1e-6, squares=torch.ones(4, 40))
rows = torch.randn(2048, 256).bfloat16()  # many tiles for each multiprocessor
skinny_linear.launch_skinny_linear(rows, w, None, Tile("hopper", 256, 64, 8, 4, block_m=128), gated=True)
assert persistent[-1] and not any(persistent[:-1])
blocks, staged = torch.randn(6, 9, 4096).bfloat16(), torch.randn(4, 6, 4096).bfloat16()
block_copy._launch_gather_blocks(blocks, slots, staged)
block_copy._launch_scatter_blocks(staged, slots, blocks)
f = torch.ones(4)
counts = torch.zeros(4, 300).short()
decode_frame._launch_embed_rows(slots, slots.int(), tables, h, 16, slots.int(), counts)
decode_frame._launch_advance_rows(slots, slots.int(), slots.int(), slots, f)
for logits in (torch.randn(4, 9000).bfloat16(), torch.randn(4, 152000), torch.randn(4, 1).half()):
    counts = torch.zeros(4, logits.shape[1]).short()
    sampling._launch_sample(logits, f, f.int(), f, f, slots, slots, (f, f, f, slots.int(), counts))
f, counts = torch.ones(5), torch.zeros(5, dtype=torch.int64)  # more rows than multiprocessors: two programs on each
sampling._launch_sample(torch.randn(5, 9000).bfloat16(), f, f.int(), f, f, counts, counts, ())
sampling._launch_sample(torch.randn(1, 900), f[:1], f[:1].int(), f[:1], f[:1], slots[:1], slots[:1].int(), ())
assert len(set(names)) == 23, set(names)
"""
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests compile the kernels")
def test_kernels_compile_without_a_gpu(tmp_path):
    run_without_gpu(CODE, tmp_path)
