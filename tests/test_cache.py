"""Where the cache is."""

from pathlib import Path

import pytest

from mini_infer.cache import cache_folder
from mini_infer.exceptions import ConfigError


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINI_INFER_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most specific variable wins; an empty one counts as none."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/mini_infer")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/mini_infer")
    monkeypatch.setenv("MINI_INFER_HOME", "")
    assert cache_folder() == Path("/cache/mini_infer")
    monkeypatch.setenv("MINI_INFER_HOME", "/ours")
    assert cache_folder() == Path("/ours")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for last, and the error says what to set."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match=r"home directory\. Set MINI_INFER_HOME"):
        cache_folder()
    monkeypatch.setenv("MINI_INFER_HOME", "/ours")
    assert cache_folder() == Path("/ours")
