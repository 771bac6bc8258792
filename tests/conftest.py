"""For every test: where Triton runs, and which tests need a GPU.

The first lines must run before any module with a Triton kernel is imported: without a GPU the kernels are interpreted.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext

# Threads that wait for one another do so asleep: on a busy machine, spinning makes every small product crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and with `-m gpu` the GPU."""
    return torch.device(request.param)


@pytest.fixture(autouse=True, scope="session")
def engines_start_side_by_side() -> Iterator[None]:
    """Several processes of tests share a GPU on purpose: their engines say how many blocks they want, and do not wait
    for one another's starts."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_infer.startup.one_start_at_a_time", lambda device: nullcontext())
        yield
