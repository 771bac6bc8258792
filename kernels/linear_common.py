"""What the kernels of matrix products with a few rows share: which rows of the weight a program owns, the gate, and the
norm of x. Each row of x is divided by its root mean square after the product, so that the product need not wait for it.
The squares are those of the x that passes through the program, or were left by the one that made x.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.common import ALIGNMENT, next_power_of_2
from mini_infer.kernels.linear_plan import Tile

LINE = tl.constexpr(64)  # entries of 16 bits in a cache line of 128 bytes


def prefetched_columns(columns: int) -> int:
    """Of the weight columns that a program goes through, how many it fetches before it may begin; a power of two."""
    return min(1024, max(int(LINE.value), next_power_of_2(columns)))


def check_tma(tile: Tile, **matrices: Tensor) -> None:
    """The rows of these matrices [rows, cols] must lie as the tensor memory accelerator wants them.

    Raises:
        ValueError: they are not contiguous, or do not start at multiples of 16 bytes.
    """
    for name, matrix in matrices.items():
        aligned = matrix.data_ptr() % ALIGNMENT == 0 and matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0
        if matrix.stride(1) != 1 or not aligned:
            raise ValueError(
                f"{tile} needs {name} with contiguous rows that start at multiples of {ALIGNMENT} bytes, got strides "
                f"{matrix.stride()} and address {matrix.data_ptr():#x}"
            )


@triton.jit
def weight_rows(n, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """This program's weight rows [BLOCK_N]; past the end the last one again, so that loads need no mask."""
    j = tl.arange(0, BLOCK_N)
    if GATED:
        half = n // 2
        rows = tl.minimum(tl.program_id(0) * (BLOCK_N // 2) + j // 2, half - 1) + j % 2 * half
    else:
        rows = tl.minimum(tl.program_id(0) * BLOCK_N + j, n - 1)
    return rows.to(tl.int64)


@triton.jit
def split_columns(part, k, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """The columns (first, one past the last) of one of SPLIT_K programs that share those of a weight, in blocks."""
    if SPLIT_K == 1:
        return 0, k
    span = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    return part * span, tl.minimum((part + 1) * span, k)


@triton.jit
def partial_squares(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Squares of x [ROWS, COLS], summed over 8 columns that lie side by side: [ROWS, COLS // 8] float32.

    A thread has these 8 to itself; what is left of the sum takes an exchange, and is done once, by the caller.
    """
    x = x.to(tl.float32)
    return tl.sum(tl.reshape(x * x, [ROWS, COLS // 8, 8]), axis=2)


@triton.jit
def row_squares(values, mask):
    """Sum of the squares of each row of values, where the mask says: a part of what the next product norms with."""
    values = tl.where(mask, values.to(tl.float32), 0.0)
    return tl.sum(values * values, axis=1)


@triton.jit
def inverse_rms(squares, k, eps):
    """1 / sqrt(mean of squares + eps), from the sum of k squares."""
    return 1.0 / tl.sqrt_rn(squares / k + tl.cast(eps, tl.float32))


@triton.jit
def silu_mul(pairs, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[M, BLOCK_N] of alternating gate and up -> [M, BLOCK_N // 2]."""
    gate, up = tl.split(tl.reshape(pairs, [M, BLOCK_N // 2, 2]))
    return gate / (1.0 + tl.exp(-gate)) * up
