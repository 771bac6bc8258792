"""What the kernels of matrix products with a few rows share: which rows of the weight a program owns, and the gate."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from mini_infer.kernels.common import next_power_of_2

LINE = tl.constexpr(64)  # entries of 16 bits in a cache line of 128 bytes


def prefetched_columns(columns: int) -> int:
    """Of the weight columns that a program goes through, how many it fetches before it may begin; a power of two."""
    return min(1024, max(int(LINE.value), next_power_of_2(columns)))


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
def silu_mul(pairs, M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[M, BLOCK_N] of alternating gate and up -> [M, BLOCK_N // 2]."""
    gate, up = tl.split(tl.reshape(pairs, [M, BLOCK_N // 2, 2]))
    return gate / (1.0 + tl.exp(-gate)) * up
