"""What a GraphSet does and in which order, with CUDA's part of it played by a script."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mini_infer.exceptions import ConfigError
from mini_infer.graphs.capture import GraphSet
from mini_infer.graphs.kv_cache import KVCache
from mini_infer.graphs.state import DecodeState
from mini_infer.graphs.steps import Model
from mini_infer.loader import load_params, read_model_files
from mini_infer.step import StepKind
from tests.tiny_models import make_tiny_model

CPU = torch.device("cpu")
DECODE, PREFILL = StepKind.DECODE, StepKind.PREFILL


class Script:
    """Stands in for `torch.cuda`: counts free memory down as steps run outside and inside of graphs, and notes all."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.free = 1_000_000
        self.cached = 0
        self.capturing = False

    def step(self, kind: StepKind, size: int, num_layers: int) -> None:
        assert not gc.isenabled()
        self.events.append(("capture" if self.capturing else "run", kind, size, num_layers))
        taken = 10 if self.capturing else 500
        self.free -= taken
        self.cached += 0 if self.capturing else taken

    def empty_cache(self) -> None:
        self.free, self.cached = self.free + self.cached, 0
        self.events.append(("empty cache",))

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.capturing = True

    def capture_end(self) -> None:
        self.capturing = False


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    parts = {
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": script.empty_cache,
        "mem_get_info": lambda device: (script.free, 2_000_000),
        "CUDAGraph": lambda: SimpleNamespace(
            capture_begin=script.capture_begin,
            capture_end=script.capture_end,
            replay=lambda: script.events.append(("replay",)),
        ),
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    clear = lambda: script.events.append(("clear workspaces",))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    def run(kind: StepKind, method: Any) -> Any:
        def noted(model: Model, what: Any) -> torch.Tensor:
            size = what if kind is DECODE else len(what.token_ids)
            script.step(kind, size, model.spec.num_layers)
            if script.capturing:  # recorded, not run: the inputs in the shared buffer are another bucket's
                return torch.zeros(size, 2, dtype=torch.int32)
            result: torch.Tensor = method(model, what)
            return result

        return noted

    monkeypatch.setattr(Model, "run_decode", run(DECODE, Model.run_decode))
    monkeypatch.setattr(Model, "run_prefill", run(PREFILL, Model.run_prefill))
    return script


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = tmp_path_factory.mktemp("model")
    make_tiny_model("llama3-gqa", folder, num_hidden_layers=4)
    files = read_model_files(folder)
    params = load_params(files, dtype=torch.float32, device=CPU, max_positions=16)
    return Model(
        files.spec, params, KVCache(files.spec, 5, 4, torch.float32, CPU), DecodeState(3, 4, files.spec.vocab_size, CPU)
    )


def capture(model: Model) -> GraphSet:
    return GraphSet(
        model, decode_sizes=[1, 3, 2], prefill_sizes=[8, 16], max_chunks=4, block_size=4, max_blocks=4, device=CPU
    )


STEPS = [(PREFILL, 16), (PREFILL, 8), (DECODE, 3), (DECODE, 2), (DECODE, 1)]


def test_order(script: Script, model: Model) -> None:
    """Every step once on few layers, their memory back, then the captures of the whole model; prefill first, largest
    first. No workspace of cuBLAS is carried into the captures, or out of them."""
    graphs = capture(model)
    assert script.events == [
        ("empty cache",),
        *(("run", *step, 2) for step in STEPS),
        ("clear workspaces",),
        ("empty cache",),
        *(("capture", *step, 4) for step in STEPS),
        ("clear workspaces",),
        ("empty cache",),
    ]
    assert [(record.kind, record.bucket) for record in graphs.ledger] == STEPS
    assert gc.isenabled()


def test_bytes(script: Script, model: Model) -> None:
    """What the captures took, one by one and together; the runs before them gave theirs back."""
    graphs = capture(model)
    assert [record.bytes for record in graphs.ledger] == [10] * 5
    assert graphs.bytes == 50


def test_sizes_and_keep(script: Script, model: Model) -> None:
    """What is dropped has no graph and no record any more; asking for it is an error that names what there is."""
    graphs = capture(model)
    assert (graphs.sizes(DECODE), graphs.sizes(PREFILL)) == ({1, 2, 3}, {8, 16})
    assert [(record.kind, record.bucket) for record in graphs.keep(DECODE, (3,))] == [(DECODE, 2), (DECODE, 1)]
    assert graphs.keep(PREFILL, (8, 16)) == []
    assert (graphs.sizes(DECODE), graphs.sizes(PREFILL)) == ({3}, {8, 16})
    assert [(record.kind, record.bucket) for record in graphs.ledger] == STEPS[:3]
    assert graphs.decode(3).shape == (3, 2)
    assert graphs.prefill((), 8).shape[1] == 2
    with pytest.raises(ConfigError, match=r"no graph for decode bucket 2; there are \[3\]"):
        graphs.decode(2)
    with pytest.raises(ConfigError, match=r"no graph for prefill bucket 4; there are \[8, 16\]"):
        graphs.prefill((), 4)
