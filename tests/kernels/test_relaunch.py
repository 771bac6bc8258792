"""Launching kernels again, without a GPU: what is handed to the driver, compared with what Triton hands to it."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.stub_driver import PREAMBLE, run_without_gpu

LISTEN = (
    PREAMBLE
    + """
from mini_infer.kernels import relaunch

calls, asked = [], []
Launcher.__call__ = lambda self, *args: calls.append((self, args))

def ask(self, *args, **kwargs):
    asked.append(args)
    return run(self, *args, **kwargs)

JITFunction.run = ask
Driver.get_current_device = lambda self: -1  # the CPU's
current_stream = 7
Driver.get_current_stream = lambda self, device=None: current_stream
relaunch._new = torch._C._dynamo.guards._empty_strided_cpu

def handed_over():
    launcher, args = calls[-1]
    plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in args]
    return launcher, plain[:6] + plain[9:]  # without the hooks, for those who listen to Triton's launches
"""
)

LAUNCHES = (
    LISTEN
    + """
from types import SimpleNamespace
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from mini_infer.kernels.compile_ahead import compile_ahead

@triton.jit(do_not_specialize=["value"])
def add(x_ptr, y_ptr, out_ptr, copy_ptr, value, count, stride, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    total = tl.load(x_ptr + places * stride, mask=places < count) + value
    if y_ptr is not None:
        total += tl.load(y_ptr + places * stride, mask=places < count)
        tl.store(copy_ptr + places, total, mask=places < count)
    tl.store(out_ptr + places, total, mask=places < count)

launches = relaunch.Launches(add)
REST, GRID = (48, 1, 16), (3, 2, 1)

def first(x, y, as_read=None, rest=REST, num_warps=4):
    outputs = torch.empty_like(x), None if y is None else torch.empty_like(x)
    launches.first((x, y), as_read or (x, y), outputs, (0.5,), rest, grid=GRID, num_warps=num_warps)

def check(x, y, value=0.5, rest=REST, num_warps=4):
    # Launched again without Triton, with what Triton hands over.
    asked.clear()
    out, copy = launches.again((x, y), value)
    assert not asked
    launcher, passed = handed_over()
    assert (copy is None) == (y is None)
    for output in (out, copy):
        assert output is None or (output.shape, output.dtype) == (x.shape, x.dtype) and output.is_contiguous()
    add[GRID](x, y, out, copy, value, *rest, num_warps=num_warps)
    expected_launcher, expected = handed_over()
    assert launcher is expected_launcher
    assert passed == [0 if place is None else place for place in expected]

def unknown(x, y):
    calls.clear()
    return launches.again((x, y), 0.5) is None and not calls

x, y = torch.zeros(64), torch.zeros(64)
assert unknown(x, y)
first(x, y)
check(x, y)
check(y, x, value=2.0)  # neither where tensors are nor what does not depend on them matters
current_stream = 8
check(x, y)
assert unknown(x, None)
first(x, None)
check(x, None)
check(x, y)

columns = torch.zeros(64, 2)[:, 0]
for a, b in [(x.half(), y), (x, y.half()), (x[:32], y), (x, columns), (x[None], y), (x.view(8, 8), y)]:
    assert unknown(a, b), (a.shape, b.shape)
first(x.half(), y, rest=(32, 2, 32), num_warps=8)
check(x.half(), y, rest=(32, 2, 32), num_warps=8)
check(x, y)
parameter = torch.nn.Parameter(x, requires_grad=False)
first(parameter, y)
check(parameter, y)

# What is not aligned, was copied or is of a kind of its own is not kept, and not found.
assert unknown(torch.zeros(65)[1:], y)
first(torch.zeros(13)[1:], y)
assert unknown(torch.zeros(12), y)
small = torch.zeros(3, 4)
first(small, y, as_read=(small.clone(), y))
assert unknown(small, y)

class Own(torch.Tensor):
    pass

own = torch.zeros(64).as_subclass(Own)
first(own, y)
assert unknown(own, y)

# Nor where somebody would miss the op.
wanted = torch.zeros(64, requires_grad=True)
first(wanted, y)
assert unknown(wanted, y)
with torch.no_grad():
    check(wanted, y)

class LookOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

with LookOn():
    assert unknown(x, y)

class LookOnFunctions(TorchFunctionMode):
    pass

with LookOnFunctions():
    assert unknown(x, y)

def transformed(a):
    assert unknown(a, y)
    return a

@torch.compile(fullgraph=True, backend="eager")
def traced(a):
    return a + 1 if launches.again((a, y), 0.5) is None else a

calls.clear()
assert traced(x)[0] == 1 and not calls
torch.vmap(transformed)(torch.zeros(2, 64))
torch.func.functionalize(transformed)(x)
Driver.get_current_device = lambda self: 0
count = len(launches._known)
first(torch.zeros(80), y, rest=(48, 1, 128))
assert len(launches._known) == count, "kept for tensors that are on another device than the current one"
Driver.get_current_device = lambda self: -1
new, relaunch._new = relaunch._new, lambda *_: SimpleNamespace(get_device=lambda: 0)
assert unknown(x, y), "another device is the current one now"
relaunch._new = new
JITFunction.run = run
calls.clear()
for _ in range(2):  # compiled, then found compiled
    with compile_ahead():
        assert unknown(x, y)
        first(torch.zeros(96), y, rest=(48, 1, 64))
assert not calls, "launched where kernels are only compiled"
assert unknown(torch.zeros(96), y)
JITFunction.run = ask
check(x, y)

relaunch._MOST_LAYOUTS = len(launches._known)
first(torch.zeros(96), y)
assert unknown(x, y)
check(torch.zeros(96), y)
"""
)

OPS = (
    LISTEN
    + """
from mini_infer.kernels import add_rmsnorm, apply_rotary_emb, norm, rmsnorm, rotary

def check(op, first, inputs, more=()):
    # `first` takes the op's inputs, None for what it has not; in the kernel's arguments the outputs come behind them.
    asked.clear()
    first(*inputs, *more)
    assert asked
    launcher, expected = handed_over()
    asked.clear()
    outputs = op(*[x for x in inputs if x is not None], *more)
    assert not asked
    again, passed = handed_over()
    assert again is launcher
    outputs = outputs if isinstance(outputs, tuple) else (outputs, None)
    addresses = [0 if x is None else x.data_ptr() for x in (*inputs, *outputs)]
    begin, end = 6, 6 + len(addresses)
    assert passed[begin:end] == addresses
    assert expected[begin : begin + len(inputs)] == [place or None for place in addresses[: len(inputs)]]
    assert passed[:begin] == expected[:begin] and passed[end:] == expected[end:]
    for output, x in zip(outputs, inputs):
        like = x if op is apply_rotary_emb else inputs[0]
        assert output is None or (output.shape, output.dtype) == (like.shape, like.dtype) and output.is_contiguous()

weight, wide = torch.randn(64), torch.randn(6, 256)
for x in (wide[:, :64], wide[:3, :64], wide[:3, 64:128].contiguous(), wide[:, :192].view(6, 3, 64), wide[:1, 128:192]):
    residual = torch.randn(x.shape)
    for _ in range(2):
        check(lambda x, weight, eps: rmsnorm(x, weight, eps), norm._launch, (x, None, weight), (1e-6,))
        check(lambda x, eps: rmsnorm(x, None, eps), norm._launch, (x, None, None), (1e-5,))
        check(add_rmsnorm, norm._launch, (x, residual, weight), (0.0,))
        check(add_rmsnorm, norm._launch, (x, x, weight), (0.0,))
square = torch.randn(64, 64)
norm._launch(square, square.T, weight, 1e-6)
assert norm._launches.again((square, square.T, weight), 1e-6) is None
norm._launch(square, None, square[:, 0], 1e-6)
assert norm._launches.again((square, None, square[:, 0]), 1e-6) is None

cos, sin = torch.randn(20, 32), torch.randn(20, 32)
for leading in ((5,), (1,), (2, 3)):
    q, k = torch.randn(*leading, 3, 64), torch.randn(*leading, 1, 64)
    positions = torch.zeros(leading, dtype=torch.int64)
    for _ in range(2):
        check(apply_rotary_emb, rotary._launch, (q, k, cos, sin, positions))
        check(apply_rotary_emb, rotary._launch, (q, k, cos, sin, positions.int()))
        check(apply_rotary_emb, rotary._launch, (q[..., :2, :], k, cos, sin, positions))
q, k, positions = torch.randn(2, 3, 3, 64), torch.randn(2, 3, 1, 64), torch.zeros(2, 3, dtype=torch.int64)
copied = [
    (torch.randn(3, 2, 3, 64).transpose(0, 1), k, cos, sin, positions),
    (q, torch.randn(3, 2, 1, 64).transpose(0, 1), cos, sin, positions),
    (torch.randn(2, 3, 64, 3).transpose(2, 3), k, cos, sin, positions),
    (q, k, cos, sin, torch.zeros(3, 2, dtype=torch.int64).T),
]
for inputs in copied:
    rotary._launch(*inputs)
    assert rotary._launches.again(inputs) is None
"""
)


def test_hands_over_what_triton_does(tmp_path: Path) -> None:
    """The same kernel and arguments as a launch by Triton, whatever came before; Triton is asked when it must be."""
    run_without_gpu(LAUNCHES, tmp_path)


def test_ops_hand_over_the_same_again(tmp_path: Path) -> None:
    """The second call hands over what the first did, but for outputs of its own; never where something was copied."""
    run_without_gpu(OPS, tmp_path)
