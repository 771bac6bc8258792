"""A tiny engine that a module's tests share, engines with options of their own, and what it gives for one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mini_infer import LLMEngine
from mini_infer.step import SampledTokens, SchedulerOutputs
from tests.engine.driving import assert_idle, greedy, make_engine, runner_of
from tests.tiny_engines import make_tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"), num_layers=2)


@pytest.fixture(scope="module")
def shared_engine(folder: Path) -> Iterator[LLMEngine]:
    with make_engine(folder) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: LLMEngine) -> Iterator[LLMEngine]:
    """An engine of the usual options, which every test leaves as it found it."""
    yield shared_engine
    assert_idle(shared_engine)


@pytest.fixture
def engine_with(folder: Path) -> Iterator[Callable[..., LLMEngine]]:
    """Makes engines with options of their own; each must be idle at the end."""
    made: list[LLMEngine] = []

    def make(**options: Any) -> LLMEngine:
        made.append(make_engine(folder, **options))
        return made[-1]

    yield make
    for engine in made:
        assert_idle(engine)
        engine.shutdown()


@pytest.fixture(scope="module")
def alone(shared_engine: LLMEngine) -> Callable[[list[int], int], list[int]]:
    """Greedy tokens of one prompt with nobody beside it. They are always the same, so they are kept."""
    known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def run(prompt: list[int], max_tokens: int) -> list[int]:
        key = tuple(prompt), max_tokens
        if key not in known:
            known[key] = shared_engine.generate([prompt], sampling_params=greedy(max_tokens))[0].token_ids
        return list(known[key])

    return run


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[LLMEngine, list[int]], None]:
    """script(engine, tokens): every request of ``engine`` "samples" these tokens, then token 3 for ever."""

    def install(engine: LLMEngine, tokens: list[int]) -> None:
        launched: dict[str, int] = {}

        class Scripted:
            span = None

            def __init__(self, outputs: SchedulerOutputs) -> None:
                self.token_ids = []
                finals = {chunk.request_id: chunk.is_last for chunk in outputs.chunks}
                for request_id in outputs.request_ids:
                    index = launched.setdefault(request_id, 0)
                    self.token_ids.append(tokens[index] if index < len(tokens) else 3)
                    launched[request_id] += finals.get(request_id, True)

            def result(self) -> SampledTokens:
                count = len(self.token_ids)
                return SampledTokens(np.array(self.token_ids, dtype=np.int32), np.full(count, -1.0, dtype=np.float32))

        monkeypatch.setattr(runner_of(engine), "execute", Scripted)

    return install
