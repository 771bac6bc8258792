"""A kernel that reads and does hardly anything else: how fast memory is read."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_READ_BLOCK, _READ_STEPS = 4096, 4


@triton.jit
def _read_kernel(values_ptr, sum_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    at = values_ptr + tl.program_id(0).to(tl.int64) * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        total += tl.load(at + step * BLOCK)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, axis=0))


def read_all(values: Tensor) -> Tensor:
    """Read every byte and do hardly anything else, which no op of PyTorch does at the rate of the memory.

    Args:
        values: [n] int32, n a multiple of 16,384.

    Returns:
        [n / 16384] int32: sums that wrap around.
    """
    programs, rest = divmod(values.numel(), _READ_BLOCK * _READ_STEPS)
    assert rest == 0, f"{values.numel()} values are no multiple of {_READ_BLOCK * _READ_STEPS}"
    sums = torch.empty(programs, dtype=torch.int32, device=values.device)
    _read_kernel[(programs,)](values, sums, BLOCK=_READ_BLOCK, STEPS=_READ_STEPS, num_warps=8)
    return sums
