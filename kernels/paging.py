"""Where the tokens of a tile are in the paged KV cache; what both attention kernels have in common."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def block_ids(table, tile, length, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The blocks of a tile's tokens, [BLOCK_N]; the null block past the length, where the table may hold anything."""
    columns = tl.arange(0, BLOCK_N)
    if BLOCK_N % BLOCK_SIZE == 0:  # the same division for every tile
        entries = tile * (BLOCK_N // BLOCK_SIZE) + columns // BLOCK_SIZE
    else:
        entries = (tile * BLOCK_N + columns) // BLOCK_SIZE
    return tl.load(table + entries, mask=tile * BLOCK_N + columns < length, other=0)


@triton.jit
def slots(tile, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where in their blocks a tile's tokens are, [BLOCK_N]."""
    columns = tl.arange(0, BLOCK_N)
    if BLOCK_N % BLOCK_SIZE == 0:
        return columns % BLOCK_SIZE
    return (tile * BLOCK_N + columns) % BLOCK_SIZE


def is_wide(cache: Tensor) -> bool:
    """Whether a place in the cache, counted in elements, may be past the largest int32."""
    return cache.shape[0] * cache.stride(0) >= 1 << 31


def check_strides(key_cache: Tensor, value_cache: Tensor) -> None:
    """The caches must have the same strides: a token has one place in both."""
    if key_cache.stride() != value_cache.stride():
        raise ValueError(f"caches must have the same strides, got {key_cache.stride()} and {value_cache.stride()}")
