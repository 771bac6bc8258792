"""`compile_ahead` without a GPU: what compiles, and when, and what is launched.

Run in processes of their own, where Triton is not interpreted, and a stub driver names the target and counts launches.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.stub_driver import PREAMBLE, run_without_gpu

KERNELS = (
    PREAMBLE
    + """
from mini_infer.kernels.compile_ahead import compile_ahead
from mini_infer.kernels.linear_plan import Tile
from mini_infer.kernels.skinny_linear import launch_skinny_linear

@triton.jit
def fill(x_ptr, n, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), n)

@triton.jit
def broken(x_ptr):
    tl.store(x_ptr + tl.arange(0, 3), 0)  # no power of two

x, weight = torch.zeros(32, 64).bfloat16(), torch.zeros(64, 64).bfloat16()

def launch():  # four kernels: others for an integer 1, and for a pointer that is not aligned
    for _ in range(2):
        fill[(1,)](x, 5, SIZE=16)
        fill[(1,)](x, 1, SIZE=16)
        fill[(1,)](x.view(-1)[1:], 5, SIZE=16)
        launch_skinny_linear(x, weight, None, Tile("tma", 64, 16, 1, 1, block_m=16))  # descriptors, dependent launch

def launch_other():
    fill[(1,)](x, 5, SIZE=32)

progress = []
with compile_ahead(lambda *args: progress.append(args)):
    launch()
    broken[(1,)](x)
    assert launched == []
    thread = threading.Thread(target=launch_other)
    thread.start()
    thread.join()
    launch_other()  # nor is what was compiled before, by this thread
    assert launched == ["fill"]
assert JITFunction.run is run
assert progress == [(done, 5) for done in range(1, 6)], progress
assert sorted(compiled) == [("_tma_kernel", True), ("fill", False), *[("fill", True)] * 3], compiled
assert sorted(launchers) == sorted(compiled), "launchers are made with their kernels"

launch()
launch_other()
assert launched == ["fill", *["fill", "fill", "fill", "_tma_kernel"] * 2, "fill"], launched
assert len(compiled) == 5
for _ in range(2):
    try:
        broken[(1,)](x)
    except triton.CompilationError:
        continue
    raise AssertionError("a kernel that does not compile was launched")

begun, done = threading.Event(), threading.Event()

def compile_elsewhere():
    with compile_ahead():
        begun.set()
        done.wait()

launched.clear()
thread = threading.Thread(target=compile_elsewhere, daemon=True)
thread.start()
begun.wait()
launch_other()
done.set()
thread.join()
assert launched == ["fill"]

class Stop(BaseException):
    pass

compiled.clear()
os.sched_getaffinity = lambda process: {0}
try:
    with compile_ahead():
        for size in (64, 128, 256):
            fill[(1,)](x, 5, SIZE=size)
        raise Stop
except Stop:
    assert JITFunction.run is run
assert len(compiled) < 3, "what was not begun was compiled"
compiled.clear()
fill[(1,)](x, 5, SIZE=512)
assert launched[-1] == "fill" and compiled.pop() == ("fill", False)
with compile_ahead():
    fill[(1,)](x, 5, SIZE=1024)
assert compiled.pop() == ("fill", True)
"""
)

STEPS = (
    PREAMBLE
    + """
from mini_infer.kernels import common
register = common.register_op
common.register_op = lambda name, fake, cpu, cuda, mutates=(): register(name, fake, cuda, cuda, mutates)

import json, sys
from mini_infer.graphs.capture import _prefill_buffers
from mini_infer.loader import load_params, read_model_files
from mini_infer.runner import ModelRunner

folder = Path(sys.argv[1])
(folder / "config.json").write_text(json.dumps({
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300,
    "max_position_embeddings": 64,
}))
files, cpu = read_model_files(folder), torch.device("cpu")
params = load_params(files, dtype=torch.bfloat16, device=cpu, max_positions=64, dummy_seed=0)
runner = ModelRunner(
    files.spec, params, device=cpu, dtype=torch.bfloat16, num_gpu_blocks=1, num_cpu_blocks=0, block_size=16,
    max_num_seqs=4, max_model_len=64,
)
launched.clear()
compiled.clear()
state = runner._state
state.token_ids.fill_(7)
kept = [state.token_ids[:4], state._fields, state._seeds, state._block_tables, state.token_counts, runner._kv.blocks]
before = [tensor.clone() for tensor in kept]
decode_sizes, prefill_sizes, max_chunks = (1, 3, 4), (16, 48), 3
runner.compile(decode_sizes, prefill_sizes, max_chunks=max_chunks)
assert all(map(torch.equal, before, kept))
assert launched == []
assert len(compiled) > 10 and all(was_ahead for _, was_ahead in compiled), compiled

compiled.clear()
buffers = _prefill_buffers(prefill_sizes, max_chunks, block_size=16, max_blocks=4, state=state, device=cpu)
with torch.inference_mode():
    for buffer in buffers.values():
        buffer.fill(())
        runner._model.run_prefill(buffer.inputs)
    for bucket in decode_sizes:
        runner._model.run_decode(bucket)
runner.measure_prefill([48], max_chunks=max_chunks, limit_s=0)
runner.measure_decode([4], limit_s=0)
assert launched and not compiled, compiled
"""
)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU tests/e2e/test_gpu_startup.py sees what a start compiles"
)
@pytest.mark.parametrize("code", [pytest.param(KERNELS, id="kernels"), pytest.param(STEPS, id="steps")])
def test_compile_ahead(code: str, tmp_path: Path) -> None:
    """Launches compile and are none; afterwards those kernels are in memory, the others are launched as ever."""
    run_without_gpu(code, tmp_path)
