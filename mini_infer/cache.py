"""Where the engine keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MINI_INFER_HOME, else $XDG_CACHE_HOME/mini_infer, else ~/.cache/mini_infer."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MINI_INFER_HOME") or cache / "mini_infer")
