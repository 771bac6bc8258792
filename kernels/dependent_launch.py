"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it still runs.

A kernel of a step begins with `release`, which lets its successor be set up as soon as all of its own programs run,
and each of its programs calls `wait` before it touches anything that another kernel of the step writes or reads. What
may come before is what nobody writes during a step: weights, RoPE tables, block tables. A kernel waits for the whole of
its predecessor, which had waited for its own, so `wait` orders it after everything before it; kernels of other
libraries take no part and start when their predecessor is done. So does the first kernel of a step, launched without
`options`: what the step before it wrote last, lengths above all, is then there for every kernel of the step.

https://docs.nvidia.com/cuda/cuda-programming-guide, "Programmatic Dependent Launch and Synchronization".
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import functools

import triton
import triton.language as tl

from mini_infer.kernels.common import INTERPRET


@functools.cache
def supported() -> bool:
    """Whether the kernels are launched this way: on GPUs of compute capability 9.0 and later."""
    return not INTERPRET and int(triton.runtime.driver.active.get_current_target().arch) >= 90


def options() -> dict[str, bool]:
    """Keyword arguments of a launch: the option of the launch itself, and the kernels' own constant."""
    return {"launch_pdl": True, "DEPENDENT": True} if supported() else {"DEPENDENT": False}


@triton.jit
def release(DEPENDENT: tl.constexpr):
    """The next kernel may start once every program of this one has come here."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Go on when the kernel before this one is done and what it wrote can be seen."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Bring the cache lines behind these pointers into the L2 cache; nothing waits for them."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
