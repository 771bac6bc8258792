"""Launches a kernel once more for tensors laid out as they were before.

Checking the arguments of an op, PyTorch's way to it, and Triton's search for the kernel that was compiled for such
arguments take several times as long as handing a small kernel to the driver. In a captured graph all of that costs
nothing; for a call from Python it is most of the time. What comes of it depends on how the tensors are laid out, not on
where they are or what they hold: so an op keeps its launches by that, and from the second call on only the addresses
are new. Triton's launch hooks are not called then.
"""

from collections.abc import Hashable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from triton.runtime import driver

from mini_infer.kernels.common import ALIGNMENT
from mini_infer.kernels.compile_ahead import compiles_only

_MOST_LAYOUTS = 4096
"""A layout takes about 1 KiB, and there is one for every number of tokens: beyond this many they are found anew."""


class Launch:
    """A compiled kernel with all that a launch of it takes, but for what comes first among its arguments."""

    __slots__ = ("_device", "_function", "_grid", "_metadata", "_rest", "_run")

    def __init__(self, kernel: Any, device: int, grid: tuple[int, int, int], rest: tuple[Hashable, ...]) -> None:
        self._run, self._function, self._metadata = kernel.run, kernel.function, kernel.packed_metadata
        self._device, self._grid, self._rest = device, grid, rest

    def __call__(self, *arguments: float) -> None:
        """Launch it on the current stream: the addresses of its tensors, then the numbers that were not kept."""
        stream = driver.active.get_current_stream(self._device)
        self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *arguments, *self._rest)


class Launches:
    """The launches of an op's kernel, by how the op's tensors are laid out: shapes, strides, types and devices.

    Args:
        kernel: The `triton.jit` function; its arguments are tensors, then numbers that do not depend on how the op's
            tensors are laid out, all `do_not_specialize`, then such that do.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[Hashable, Launch] = {}

    def find(self, *inputs: Tensor | None) -> tuple[Launch, list[int]] | None:
        """The launch for an op's tensors, if there was one for such, and their addresses (0 for none).

        They were checked, then, and need not be again. None as well where somebody would miss the op.
        """
        if _is_watched() or not self._known:
            return None
        launch = self._known.get(_layout(inputs))
        if launch is None:
            return None
        addresses = [0 if x is None else x.data_ptr() for x in inputs]
        return (launch, addresses) if reduce(or_, addresses) % ALIGNMENT == 0 else None

    def first(
        self,
        inputs: tuple[Tensor | None, ...],
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        free: tuple[float, ...],
        rest: tuple[Hashable, ...],
        num_warps: int,
        **options: bool,
    ) -> None:
        """Launch the kernel on the current stream; keep the launch, unless an input had to be copied for it.

        Args:
            inputs: The op's tensors.
            grid: Programs along each axis, at least 1.
            tensors: The kernel's: the inputs, views or copies of them, something in place of None; then the outputs.
            free: The numbers that do not depend on how the op's tensors are laid out.
            rest: The other numbers, and the constants.
            num_warps: Warps of a program.
            options: Further options of the launch.
        """
        kernel = self._kernel[grid](*tensors, *free, *rest, num_warps=num_warps, **options)
        if kernel is None or kernel.function is None:
            return  # in the interpreter, or where Triton was made to compile only
        copied = any(x is not None and x.data_ptr() != t.data_ptr() for x, t in zip(inputs, tensors, strict=False))
        if not copied and all(x is None or _is_plain(x) for x in inputs):
            if len(self._known) == _MOST_LAYOUTS:
                self._known.clear()
            self._known[_layout(inputs)] = Launch(kernel, driver.active.get_current_device(), grid, rest)


def _is_watched() -> bool:
    """Whether a kernel must not be launched past PyTorch: in a trace, a mode that sees ops, or to compile ahead."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or compiles_only()


def _is_plain(x: Tensor) -> bool:
    """Whether it is a tensor like any other: no subclass, which may want more than the result, no gradient, aligned."""
    gradient = x.requires_grad and torch.is_grad_enabled()
    return type(x) in (Tensor, Parameter) and not gradient and x.data_ptr() % ALIGNMENT == 0


def _layout(inputs: tuple[Tensor | None, ...]) -> Hashable:
    """What the launch for such inputs depends on."""
    grad = torch.is_grad_enabled()
    tensors = [
        None if x is None else (type(x), x.dtype, x.shape, x.stride(), x.get_device(), grad and x.requires_grad)
        for x in inputs
    ]
    return driver.active.get_current_device(), *tensors
