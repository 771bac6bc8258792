"""Backends that one test body runs on, and how results are compared."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mini_infer.kernels import relaunch
from mini_infer.kernels.common import INTERPRET

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Backend:
    """One way to run an op: torch on the CPU, Triton in the interpreter, or Triton compiled."""

    name: str  # "cpu", "interpreter" or "cuda"
    device: torch.device

    @property
    def small(self) -> bool:
        """Whether cases must be kept to a few programs."""
        return self.name == "interpreter"

    def pick(self, public: Callable[..., Any], launch: Callable[..., Any]) -> Callable[..., Any]:
        """The public function, or for the interpreter the launcher that it would reach on a GPU."""
        return launch if self.name == "interpreter" else public


@pytest.fixture(params=["cpu", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend in turn, with new tensors poisoned so that an output left unwritten shows."""
    if request.param == "interpreter" and not INTERPRET:
        pytest.skip("Triton is compiled in this process")
    torch.manual_seed(0)
    empty, empty_like, new = torch.empty, torch.empty_like, relaunch._new

    def poison(out: torch.Tensor) -> torch.Tensor:
        return out.fill_(float("nan") if out.is_floating_point() else 123456789)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(relaunch, "_new", lambda *args: poison(new(*args)))
    return Backend(request.param, torch.device("cuda" if request.param == "cuda" else "cpu"))


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """assert_close(name, out, expected): relative error in the 2-norm, by out's dtype, against a float64 reference."""

    def check(name: str, out: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
        assert expected.dtype == torch.float64
        assert out.shape == expected.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(expected.shape)}"
        assert torch.isfinite(out).all(), f"{name}: {int((~torch.isfinite(out)).sum())} elements are not finite"
        error = float((out.double().cpu() - expected.cpu()).norm() / expected.norm().cpu().clamp_min(1e-30))
        limit = tolerance or TOLERANCE[out.dtype]
        assert error < limit, f"{name}: relative error {error:.3g}, limit {limit:g}"

    return check


@dataclass(frozen=True)
class PagedCache:
    """A paged cache of random K/V for sequences of given lengths, all else (null block included) huge noise."""

    key_cache: torch.Tensor  # [num_blocks, num_kv_heads, block_size, head_dim], a view of a larger tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    context_lens: torch.Tensor  # [num_seqs] int32
    keys: list[torch.Tensor]  # per sequence [length, num_kv_heads, head_dim] float64
    values: list[torch.Tensor]


@pytest.fixture
def make_cache() -> Callable[..., PagedCache]:
    """make_cache(lens, kv_heads, head_dim, block_size, dtype, device, max_blocks=None) -> PagedCache"""

    def make(
        lens: list[int],
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_blocks: int | None = None,
    ) -> PagedCache:
        generator = torch.Generator().manual_seed(sum(lens) + head_dim)
        counts = [-(-length // block_size) for length in lens]
        num_blocks = sum(counts) + 3
        width = max_blocks or max(counts) + 1
        pool = torch.randn(2, num_blocks, kv_heads, block_size, head_dim + 8, generator=generator) * 1e4
        ids = torch.randperm(num_blocks - 1, generator=generator) + 1
        tables = torch.zeros(len(lens), width, dtype=torch.int32)
        keys, values = [], []
        used = 0
        for seq, (length, count) in enumerate(zip(lens, counts, strict=True)):
            table = ids[used : used + count]
            used += count
            tables[seq, :count] = table
            position = torch.arange(length)
            kv = torch.randn(2, length, kv_heads, head_dim, generator=generator).to(dtype)
            pool[:, table[position // block_size], :, position % block_size, :head_dim] = kv.float().transpose(0, 1)
            keys.append(kv[0].double())
            values.append(kv[1].double())
        pool = pool.to(dtype).to(device)
        context_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        caches = pool[..., :head_dim]
        return PagedCache(caches[0], caches[1], tables.to(device), context_lens, keys, values)

    return make
