"""What an engine may use of its device's memory, and how it divides it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import LLMEngine
from mini_infer.builder import GRAPH_MARGIN
from mini_infer.device_memory import divide_memory, estimate_plan
from mini_infer.exceptions import OutOfMemoryError
from mini_infer.graphs.spec import ModelSpec
from mini_infer.loader import read_model_files
from mini_infer.memory.plan import CONTEXT_BYTES, GIB
from mini_infer.shape import Shape
from mini_infer.startup import assemble
from tests.tiny_engines import make_tiny_folder, tiny_config

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(folder: Path) -> ModelSpec:
    return read_model_files(folder).spec


def test_the_pool_must_hold_one_sequence(folder: Path) -> None:
    """512 tokens take 32 blocks: 31 are refused with the number, the need and the ways out; 32 will do."""
    with pytest.raises(OutOfMemoryError) as raised:
        LLMEngine(tiny_config(folder, max_model_len=512, num_gpu_blocks=31))
    message = str(raised.value)
    for part in ("max_model_len=512", "takes 32 blocks", "there are 31", "at most 496 fits", "raise num_gpu_blocks"):
        assert part in message
    assert assemble(tiny_config(folder, max_model_len=512, num_gpu_blocks=32)).plan.num_gpu_blocks == 32


def test_too_little_free_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without memory: the message names what can be changed, and its bound on the length works."""
    monkeypatch.setattr("mini_infer.device_memory.free_cpu_memory", lambda: 200_000)
    with pytest.raises(OutOfMemoryError, match=r"max_model_len.*gpu_memory_utilization") as raised:
        LLMEngine(tiny_config(folder, max_model_len=512))
    bound = re.search(r"at most (\d+) fits", str(raised.value))
    assert bound is not None
    assert assemble(tiny_config(folder, max_model_len=int(bound[1]))).shape.max_model_len == int(bound[1])


def test_more_blocks_than_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of blocks that the user asked for is honoured or refused, never cut."""
    monkeypatch.setattr("mini_infer.device_memory.free_cpu_memory", lambda: 10_000_000)
    assert assemble(tiny_config(folder, num_gpu_blocks=1000)).plan.num_gpu_blocks == 1000
    with pytest.raises(OutOfMemoryError, match="num_gpu_blocks=5000 does not fit on the CPU"):
        LLMEngine(tiny_config(folder, num_gpu_blocks=5000))


def test_default_pool_on_a_cpu(folder: Path) -> None:
    """No more than all sequences at full length could fill."""
    assert assemble(tiny_config(folder, max_num_seqs=3, max_model_len=64, block_size=16)).plan.num_gpu_blocks == 12


def test_swap_space(folder: Path, spec: ModelSpec) -> None:
    """By size in GiB, or in blocks, which win; 0 is none."""
    block_bytes = 2 * spec.num_layers * spec.kv_size * 4 * 16
    options: dict[str, Any] = {"num_cpu_blocks": None, "swap_space_gib": 0.001}
    expected = int(0.001 * 2**30) // block_bytes
    assert expected > 0
    assert assemble(tiny_config(folder, **options)).plan.num_cpu_blocks == expected
    assert assemble(tiny_config(folder, **{**options, "num_cpu_blocks": 7})).plan.num_cpu_blocks == 7
    assert assemble(tiny_config(folder, **{**options, "swap_space_gib": 0})).plan.num_cpu_blocks == 0


def test_estimated_plan_is_the_plan(folder: Path) -> None:
    """`mini-infer info` shows, without loading anything, what the engine then does."""
    config = tiny_config(folder, num_gpu_blocks=40)
    spec, plan = estimate_plan(config)
    real = assemble(config).plan
    assert spec == read_model_files(folder).spec
    assert (plan.num_gpu_blocks, plan.kv_cache) == (real.num_gpu_blocks, real.kv_cache)


def test_others_on_the_gpu(folder: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named where there is too little left beside them, and in the plan."""
    shape = Shape(tiny_config(folder, gpu_memory_utilization=0.45), spec, GPU, torch.float16, 64)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (44 * GIB, 80 * GIB))
    plan = divide_memory(shape, weights=20 * GIB, workspace=0, graphs=0)
    assert plan.budget == int(80 * GIB * 0.45) - CONTEXT_BYTES
    assert "a GPU (36.00 GiB held by others)" in plan.describe()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    with pytest.raises(OutOfMemoryError, match=r"a GPU \(70\.00 GiB held by others\) cannot hold"):
        divide_memory(shape, weights=20 * GIB, workspace=0, graphs=0)


def test_graphs_and_workspace_are_not_added(folder: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run outside their graphs before the first capture only, so the larger of the two is set aside."""
    gpu = {"mem_get_info": (9 << 30, 10 << 30), "get_device_name": "a GPU"}
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for capture_graphs, graphs, workspace, expected in (
        (True, 1000, 600, (1000 + GRAPH_MARGIN, 0)),
        (True, 1000, GRAPH_MARGIN + 1600, (1000 + GRAPH_MARGIN, 600)),
        (False, 0, 600, (0, 600)),
    ):
        shape = Shape(tiny_config(folder, capture_graphs=capture_graphs), spec, GPU, torch.float16, 64)
        plan = divide_memory(shape, weights=1 << 30, workspace=workspace, graphs=graphs, held=1 << 30)
        counts = 2 * shape.config.max_num_seqs * spec.vocab_size
        assert (plan.graphs, plan.workspace - counts) == expected
        assert 0 <= plan.reserve < plan.block_bytes
