"""Where tokens are in the paged cache. The kernels' part of it is tested with the kernels."""

import torch

from mini_infer.kernels.paging import is_wide


def test_wide_caches():
    """From 2 ** 31 elements on, by the strides: a cache may be a view of a larger one."""
    elements = 2 * 16 * 64
    assert not is_wide(torch.empty(9, 2, 16, 64))
    assert is_wide(torch.empty((1 << 31) // elements, 2, 16, 64, device="meta"))
    assert not is_wide(torch.empty((1 << 31) // elements - 1, 2, 16, 64, device="meta"))
    assert is_wide(torch.empty((1 << 31) // elements // 4, 4, 2, 16, 64, device="meta")[:, 0])
