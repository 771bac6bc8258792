"""`Relaunch` without a GPU: what is handed to the driver, compared with what Triton itself hands to it."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.stub_driver import PREAMBLE, run_without_gpu

SCRIPT = (
    PREAMBLE
    + """
from mini_infer.kernels.compile_ahead import compile_ahead
from mini_infer.kernels.relaunch import Relaunch

calls, asked = [], []
Launcher.__call__ = lambda self, *args: calls.append((self, args))

@triton.jit(do_not_specialize=["count", "value"])
def fill(x_ptr, y_ptr, count, value, stride, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(x_ptr + places * stride, value, mask=places < count)
    tl.store(y_ptr + places * stride, value, mask=places < count)

def ask(self, *args, **kwargs):
    asked.append(args)
    return run(self, *args, **kwargs)

JITFunction.run = ask
relaunch = Relaunch(fill)
x, y = torch.zeros(64), torch.zeros(64)

def check(tensors, free, numbers, constants, num_warps=4, known=False):
    asked.clear()
    relaunch((3, 2, 1), tensors, free, numbers, constants, num_warps=num_warps)
    assert bool(asked) != known, (numbers, constants)
    launcher, args = calls[-1]
    fill[3, 2, 1](*tensors, *free, *numbers, *constants, num_warps=num_warps)
    expected_launcher, expected = calls[-1]
    assert launcher is expected_launcher, "it is the kernel that Triton takes"
    plain = lambda value: value.data_ptr() if isinstance(value, torch.Tensor) else value
    hooks = slice(6, 9)  # for those who listen to Triton's launches
    passed, expected = [[plain(value) for value in each] for each in (args, expected)]
    del passed[hooks], expected[hooks]
    assert passed == expected, (passed, expected)

check((x, y), (5, 0.5), (1,), (16,))
check((x, y), (5, 0.5), (1,), (16,), known=True)
check((y, x), (1, 2.0), (1,), (16,), known=True)  # neither where tensors are nor free numbers matter
check((x, y), (16, 0.5), (1,), (16,), known=True)
check((x, y), (5, 0.5), (2,), (16,))
check((x, y), (5, 0.5), (1,), (32,))
check((x, y), (5, 0.5), (1,), (16,), num_warps=8)
check((x.half(), y.half()), (5, 0.5), (1,), (16,))
check((x, y.half()), (5, 0.5), (1,), (16,))
for _ in range(2):  # what is not aligned always goes Triton's way
    check((x[1:], y), (5, 0.5), (1,), (16,))
    check((x, y[1:]), (5, 0.5), (48,), (16,))
check((x, y), (5, 0.5), (48,), (16,))  # and is not taken for what is
for numbers, constants in ((1, 16), (2, 16), (1, 32), (48, 16)):
    check((x, y), (7, 1.5), (numbers,), (constants,), known=True)

calls.clear()
JITFunction.run = run
with compile_ahead():
    for size in (16, 64, 64):
        relaunch((1, 1, 1), (x, y), (5, 0.5), (1,), (size,), num_warps=4)
assert not calls, "launched where kernels are only compiled"
JITFunction.run = ask
check((x, y), (5, 0.5), (1,), (64,))
check((x, y), (5, 0.5), (1,), (64,), known=True)
"""
)


def test_hands_over_what_triton_does(tmp_path: Path) -> None:
    """The same kernel and arguments as a launch by Triton, whatever came before; Triton is asked when it must be."""
    run_without_gpu(SCRIPT, tmp_path)
