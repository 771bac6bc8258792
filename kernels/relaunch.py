"""Launches a kernel once more without working out anew what it was compiled for.

Triton looks at every argument of every launch, to find the kernel compiled for such arguments. In a captured graph that
costs nothing; for a call from Python it is most of the time of a small kernel. Here whoever launches says which numbers
a kernel depends on, and from the second launch on only its pointers and numbers are handed to the driver. Triton's
launch hooks are not called then, nor does it look whether the pointers are the GPU's.
"""

from collections.abc import Hashable
from functools import reduce
from operator import or_
from typing import Any

from torch import Tensor
from triton.runtime import driver

from mini_infer.kernels.common import ALIGNMENT, INTERPRET
from mini_infer.kernels.compile_ahead import compiles_only


class Relaunch:
    """A Triton kernel whose arguments are tensors, then free numbers, then other numbers, then constants.

    Args:
        kernel: The `triton.jit` function; the free numbers are among its `do_not_specialize`.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[Hashable, tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        free: tuple[float, ...],
        numbers: tuple[int, ...],
        constants: tuple[Hashable, ...],
        num_warps: int,
        **options: bool,
    ) -> None:
        """Launch it on the current stream of the current device.

        Args:
            grid: Programs along each axis, at least 1.
            tensors: On the current device.
            free: Numbers for which nothing is compiled, each always a float or always an integer of 32 bits.
            numbers: Numbers for which the kernel may be compiled, as Triton does for 1 and multiples of 16.
            constants: The values of the kernel's constants.
            num_warps: Warps of a program.
            options: Further options of a launch, always the same in a process.
        """
        if INTERPRET or compiles_only():
            self._kernel[grid](*tensors, *free, *numbers, *constants, num_warps=num_warps, **options)
            return
        device = driver.active.get_current_device()
        key = (device, tuple([tensor.dtype for tensor in tensors]), numbers, constants, num_warps)
        pointers = [tensor.data_ptr() for tensor in tensors]
        aligned = reduce(or_, pointers) % ALIGNMENT == 0
        known = self._known.get(key) if aligned else None
        if known is not None:
            run, function, metadata = known
            stream = driver.active.get_current_stream(device)
            run(*grid, stream, function, metadata, None, None, None, *pointers, *free, *numbers, *constants)
            return
        kernel = self._kernel[grid](*tensors, *free, *numbers, *constants, num_warps=num_warps, **options)
        launched = kernel is not None and kernel.function is not None  # not where Triton was made to only compile
        if aligned and launched:
            self._known[key] = kernel.run, kernel.function, kernel.packed_metadata
