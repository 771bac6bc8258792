"""Device, type, length and buckets of an engine, from its options."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import mini_infer
from mini_infer import EngineConfig, LLMEngine
from mini_infer.exceptions import ConfigError
from mini_infer.graphs.spec import ModelSpec
from mini_infer.loader import read_model_files
from mini_infer.shape import Shape, choose_device, choose_dtype, choose_max_model_len, code_digest
from tests.tiny_models import MAX_POSITIONS, make_tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_model("llama3-gqa", path, num_hidden_layers=1)
    return path


@pytest.fixture(scope="module")
def spec(folder: Path) -> ModelSpec:
    return read_model_files(folder).spec


def config_of(folder: Path, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), **{"device": "cpu", "max_num_seqs": 40, **options})


@NO_GPU
def test_cuda_without_a_gpu(folder: Path) -> None:
    """Refused before anything is loaded, with the ways out."""
    with pytest.raises(ConfigError, match="device='cuda' but PyTorch sees no GPU; use device='cpu'"):
        choose_device("cuda")
    for start in (LLMEngine, Shape.of):
        with pytest.raises(ConfigError, match="sees no GPU"):
            start(config_of(Path("/no/such/model"), device="cuda"))


@NO_GPU
def test_auto_is_the_cpu_without_a_gpu() -> None:
    assert choose_device("auto") == CPU


def test_auto_is_the_gpu_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one, by its number, so that it does not change under way."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_type(name: str) -> None:
    """What was asked for; a CPU always takes float32."""
    assert choose_dtype(name, GPU) is getattr(torch, name)
    assert choose_dtype(name, CPU) is torch.float32


def test_max_model_len_bounds(spec: ModelSpec, folder: Path) -> None:
    """From a prompt token and a generated one to what the model was made for."""
    assert choose_max_model_len(None, spec) == MAX_POSITIONS
    assert choose_max_model_len(2, spec) == 2
    assert choose_max_model_len(MAX_POSITIONS, spec) == MAX_POSITIONS
    for value in (1, MAX_POSITIONS + 1):
        with pytest.raises(ConfigError, match=f"between 2 and the model's {MAX_POSITIONS}, got {value}"):
            Shape.of(config_of(folder, max_model_len=value))


def test_of_reads_the_model(folder: Path, spec: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    """With the spec at hand nothing is read, and the same comes out. Nothing is logged: callers ask more than once."""
    shape = Shape.of(config_of(folder))
    assert shape == Shape.of(config_of(folder), spec)
    assert (shape.spec, shape.device, shape.dtype, shape.max_model_len) == (spec, CPU, torch.float32, MAX_POSITIONS)
    assert not caplog.records


def test_sizes(folder: Path) -> None:
    """The user's list is completed with the largest size; the default reaches it."""
    shape = Shape.of(config_of(folder, decode_buckets=[2, 7, 80], prefill_buckets=[32]))
    assert shape.decode_sizes == (2, 7, 40)
    assert shape.prefill_sizes == (32, shape.max_prefill_tokens)
    default = Shape.of(config_of(folder, max_prefill_tokens=100))
    assert default.decode_sizes[:16] == tuple(range(1, 17))
    assert default.decode_sizes[-1] == 40
    assert default.prefill_sizes[-1] == default.max_prefill_tokens == 100


def test_code_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels, or other functions around them: what was measured with the old ones counts no more."""
    for package in ("kernels", "graphs"):
        shutil.copytree(Path(mini_infer.__file__).parent / package, tmp_path / package)
    before = code_digest()
    monkeypatch.setattr(mini_infer, "__file__", str(tmp_path / "__init__.py"))
    assert code_digest() == before
    for name in ("kernels/norm.py", "graphs/steps.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# changed\n")
        assert code_digest() != before
        before = code_digest()


def test_key_of_the_plan(folder: Path) -> None:
    """Whatever changes the steps changes the key: the default sizes by name are not the default, which is pruned."""
    default = Shape.of(config_of(folder))
    assert default.plan_key() == Shape.of(config_of(folder, seed=5, num_gpu_blocks=9)).plan_key()
    for options in (
        {"max_num_seqs": 39},
        {"max_model_len": 100},
        {"block_size": 32},
        {"decode_buckets": list(default.decode_sizes)},
        {"prefill_buckets": list(default.prefill_sizes)},
        {"max_prefill_tokens": 64},
    ):
        assert Shape.of(config_of(folder, **options)).plan_key() != default.plan_key()
