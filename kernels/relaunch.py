"""Launches a kernel once more for tensors laid out as they were before.

Checking the arguments of an op, PyTorch's way to it, and Triton's search for the kernel that was compiled for such
arguments take several times as long as handing a small kernel to the driver. In a captured graph all of that costs
nothing; for a call from Python it is most of the time. What comes of it depends on how the tensors are laid out, not on
where they are or what they hold: so an op keeps its launches by that, and from the second call on only the addresses
are new. Profilers see the kernel then, not the op, and Triton's launch hooks are not called.

An op asks for its launch twice: in the public function, past PyTorch's dispatcher, and in what the dispatcher calls,
for compiled code.
"""

from collections.abc import Callable, Hashable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _any_requires_grad, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import maybe_current_level
from torch.compiler import is_compiling
from torch.nn import Parameter
from triton.runtime import driver

from mini_infer.kernels.common import ALIGNMENT
from mini_infer.kernels.compile_ahead import compiles_only

_MOST_LAYOUTS = 4096
"""A layout takes 1 to 2 KiB, and there is one for every number of tokens: beyond this many they are found anew."""

_new: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
"""A tensor on the current device, by sizes, strides and type, past the dispatcher, as torch.compile's code makes it."""


class _Launch(NamedTuple):
    """All that a launch takes, but for addresses and what does not depend on how tensors are laid out."""

    run: Any
    function: Any
    metadata: Any
    device: int
    stream: Callable[[int], int]
    grid: tuple[int, int, int]
    outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None]
    rest: tuple[Hashable, ...]


class Launches:
    """The launches of an op's kernel, by how the op's tensors are laid out: shapes, strides, types and devices.

    Args:
        kernel: The `triton.jit` function. Its arguments are the op's inputs, the op's outputs, numbers that do not
            depend on how the inputs are laid out (`do_not_specialize`), and then all else.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[Hashable, _Launch] = {}

    def again(self, inputs: tuple[Tensor | None, ...], *free: float) -> list[Any] | None:
        """Launch the kernel as it was for inputs laid out like these, which were checked then and need not be again.

        Args:
            inputs: The op's, strided tensors of any layout.
            free: The numbers that do not depend on how the inputs are laid out.

        Returns:
            The outputs, new tensors; None where the op has to go its usual way.
        """
        if is_compiling() or not self._known or compiles_only():
            return None
        # Modes that look on at ops, transforms such as vmap and gradients are the dispatcher's part.
        if _len_torch_dispatch_stack() or _len_torch_function_stack() or maybe_current_level() is not None:
            return None
        if is_grad_enabled() and _any_requires_grad(*inputs):
            return None
        launch = self._known.get(_layout(inputs))
        if launch is None:
            return None
        addresses = [0 if x is None else x.data_ptr() for x in inputs]
        if reduce(or_, addresses) % ALIGNMENT:
            return None
        run, function, metadata, device, stream, grid, layouts, rest = launch
        outputs: list[Any] = [None if layout is None else _new(*layout) for layout in layouts]
        if outputs[0].get_device() != device:
            return None
        addresses += [0 if x is None else x.data_ptr() for x in outputs]
        run(*grid, stream(device), function, metadata, None, None, None, *addresses, *free, *rest)
        return outputs

    def first(
        self,
        inputs: tuple[Tensor | None, ...],
        as_read: tuple[Tensor | None, ...],
        outputs: tuple[Tensor | None, ...],
        free: tuple[float, ...],
        rest: tuple[Hashable, ...],
        grid: tuple[int, int, int],
        num_warps: int,
        **options: bool,
    ) -> None:
        """Launch the kernel on the current stream; keep the launch if its inputs are plain and none had to be copied.

        Args:
            inputs: The op's; None for each that it is called without.
            as_read: What the kernel reads: inputs, views or copies of them.
            outputs: New contiguous tensors, the first of them there in any case.
            free: The numbers that do not depend on how the inputs are laid out.
            rest: What else the kernel takes.
            grid: Programs along each axis, at least 1.
            num_warps: Warps of a program.
            options: Further options of the launch.
        """
        kernel = self._kernel[grid](*as_read, *outputs, *free, *rest, num_warps=num_warps, **options)
        if kernel is None or kernel.function is None:
            return  # in the interpreter, or only compiled so far
        device = driver.active.get_current_device()
        for x, read in zip(inputs, as_read, strict=True):
            if x is not None and read is not None and not (_is_plain(x, device) and x.data_ptr() == read.data_ptr()):
                return
        layouts = [None if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in outputs]
        if len(self._known) >= _MOST_LAYOUTS:
            self._known.clear()
        stream = driver.active.get_current_stream
        self._known[_layout(inputs)] = _Launch(
            kernel.run, kernel.function, kernel.packed_metadata, device, stream, grid, layouts, rest
        )


def _is_plain(x: Tensor, device: int) -> bool:
    """Whether it is aligned, on this device, and of no subclass, whose outputs might be others."""
    return type(x) in (Tensor, Parameter) and x.get_device() == device and x.data_ptr() % ALIGNMENT == 0


def _layout(inputs: tuple[Tensor | None, ...]) -> Hashable:
    """What the launch for such inputs depends on."""
    return tuple([x if x is None else (type(x), x.dtype, x.shape, x.stride(), x.get_device()) for x in inputs])
