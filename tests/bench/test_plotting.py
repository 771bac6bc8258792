"""What a plot needs is known before anything is measured."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mini_infer.bench.plotting import load_pyplot
from mini_infer.exceptions import ConfigError


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        load_pyplot(tmp_path / "plot.png")


def test_without_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        load_pyplot(tmp_path / "nowhere" / "plot.png")


def test_no_display_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that draws to files; a name alone is a file in the current folder."""
    chosen: list[str] = []
    matplotlib, pyplot = ModuleType("matplotlib"), ModuleType("matplotlib.pyplot")
    monkeypatch.setattr(matplotlib, "use", chosen.append, raising=False)
    monkeypatch.setattr(matplotlib, "pyplot", pyplot, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    assert load_pyplot(Path("plot.png")) is pyplot
    assert chosen == ["Agg"]
