"""Launching kernels again, without a GPU: what is handed to the driver, compared with what Triton hands to it."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.stub_driver import PREAMBLE, run_without_gpu

LISTEN = (
    PREAMBLE
    + """
calls, asked = [], []
Launcher.__call__ = lambda self, *args: calls.append((self, args))

def ask(self, *args, **kwargs):
    asked.append(args)
    return run(self, *args, **kwargs)

JITFunction.run = ask

def handed_over():
    launcher, args = calls[-1]
    plain = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in args]
    return launcher, plain[:6] + plain[9:]  # without the hooks, for those who listen to Triton's launches
"""
)

LAUNCHES = (
    LISTEN
    + """
from torch.utils._python_dispatch import TorchDispatchMode
from mini_infer.kernels import relaunch
from mini_infer.kernels.compile_ahead import compile_ahead

@triton.jit(do_not_specialize=["value"])
def fill(x_ptr, y_ptr, value, count, stride, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(x_ptr + places * stride, value, mask=places < count)
    tl.store(y_ptr + places * stride, value, mask=places < count)

launches = relaunch.Launches(fill)
x, y = torch.zeros(64), torch.zeros(64)

def first(inputs, tensors=None, rest=(48, 1, 16), num_warps=4):
    launches.first(inputs, (3, 2, 1), inputs if tensors is None else tensors, (0.5,), rest, num_warps=num_warps)

def check(a, b, value=0.5, rest=(48, 1, 16), num_warps=4):
    launch, addresses = launches.find(a, b)
    assert addresses == [a.data_ptr(), b.data_ptr()]
    asked.clear()
    launch(*addresses, value)
    assert not asked, "Triton was not needed"
    ours = handed_over()
    fill[3, 2, 1](a, b, value, *rest, num_warps=num_warps)
    assert ours == handed_over()

assert launches.find(x, y) is None
first((x, y))
check(x, y)
check(y, x, value=2.0)  # neither where tensors are nor the other numbers matter

others = [
    (x.half(), y), (x, y.half()), (x[:32], y), (x, torch.zeros(128)[::2]), (x[None], y), (x.view(8, 8), y)
]
for a, b in others:
    assert launches.find(a, b) is None, (a.shape, b.shape)
first((x.half(), y), rest=(32, 2, 32), num_warps=8)
check(x.half(), y, rest=(32, 2, 32), num_warps=8)
check(x, y)
parameter = torch.nn.Parameter(x)
with torch.no_grad():
    first((parameter, y))
    check(parameter, y)

# What is not aligned, copied or somebody's own kind is not kept, and not found.
odd = torch.zeros(65)[1:]
assert launches.find(odd, y) is None
first((torch.zeros(13)[1:], y))
assert launches.find(torch.zeros(12), y) is None
first((torch.zeros(3, 4), y), (torch.zeros(3, 4), y))
assert launches.find(torch.zeros(3, 4), y) is None

class Own(torch.Tensor):
    pass

own = torch.zeros(64).as_subclass(Own)
first((own, y))
assert launches.find(own, y) is None

# Nor while somebody would miss the op.
wanted = torch.zeros(64, requires_grad=True)
first((wanted, y))
assert launches.find(wanted, y) is None
with torch.no_grad():
    check(wanted, y)

class See(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

with See():
    assert launches.find(x, y) is None
calls.clear()
JITFunction.run = run
with compile_ahead():
    assert launches.find(x, y) is None
    first((torch.zeros(96), y), rest=(48, 1, 64))
assert not calls, "launched where kernels are only compiled"
assert launches.find(torch.zeros(96), y) is None
JITFunction.run = ask
check(x, y)

relaunch._MOST_LAYOUTS = len(launches._known)
first((torch.zeros(96), y))
assert launches.find(x, y) is None and launches.find(torch.zeros(96), y) is not None
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
    outputs = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    begin, middle = 6, 6 + len(inputs)
    end = middle + len(outputs)
    assert passed[:begin] == expected[:begin]
    assert passed[begin:middle] == [0 if x is None else x.data_ptr() for x in inputs]
    assert all(a == b for a, b in zip(passed[begin:middle], expected[begin:middle]) if a != 0)
    assert passed[middle:end] == [x.data_ptr() for x in outputs]
    assert passed[end:] == expected[end:]
    for x, like in zip(outputs, inputs):
        like = inputs[0] if like is None or op is not apply_rotary_emb else like
        assert x.shape == like.shape and x.dtype == like.dtype and x.is_contiguous()

weight, wide = torch.randn(64), torch.randn(6, 256)
for x in (wide[:, :64], wide[:3, :64], wide[:3, 64:128].contiguous(), wide[:, :192].view(6, 3, 64), wide[:1, 128:192]):
    residual = torch.randn(x.shape)
    for _ in range(2):
        check(lambda x, weight, eps: rmsnorm(x, weight, eps), norm._launch_first, (x, None, weight), (1e-6,))
        check(lambda x, eps: rmsnorm(x, None, eps), norm._launch_first, (x, None, None), (1e-5,))
        check(add_rmsnorm, norm._launch_first, (x, residual, weight), (0.0,))
        check(add_rmsnorm, norm._launch_first, (x, x, weight), (0.0,))
square = torch.randn(64, 64)
norm._launch_first(square, square.T, weight, 1e-6)
assert norm._launches.find(square, square.T, weight) is None
norm._launch_first(square, None, square[:, 0], 1e-6)
assert norm._launches.find(square, None, square[:, 0]) is None

cos, sin = torch.randn(20, 32), torch.randn(20, 32)
for leading in ((5,), (1,), (2, 3)):
    q, k = torch.randn(*leading, 3, 64), torch.randn(*leading, 1, 64)
    positions = torch.zeros(leading, dtype=torch.int64)
    for _ in range(2):
        check(apply_rotary_emb, rotary._launch_first, (q, k, cos, sin, positions))
        check(apply_rotary_emb, rotary._launch_first, (q, k, cos, sin, positions.int()))
        check(apply_rotary_emb, rotary._launch_first, (q[..., :2, :], k, cos, sin, positions))
apart = q.transpose(0, 1), k.transpose(0, 1), cos, sin, positions.T
rotary._launch_first(*apart)
assert rotary._launches.find(*apart) is None
"""
)


def test_hands_over_what_triton_does(tmp_path: Path) -> None:
    """The same kernel and arguments as a launch by Triton, whatever came before; Triton is asked when it must be."""
    run_without_gpu(LAUNCHES, tmp_path)


def test_ops_hand_over_the_same_again(tmp_path: Path) -> None:
    """The second call hands over what the first did, but for outputs of its own; never where something was copied."""
    run_without_gpu(OPS, tmp_path)
