"""Where the engine keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path

from mini_infer.exceptions import ConfigError


def cache_folder() -> Path:
    """$MINI_INFER_HOME, else $XDG_CACHE_HOME/mini_infer, else ~/.cache/mini_infer.

    Raises:
        ConfigError: none of them is set, and the user has no home.
    """
    if home := os.environ.get("MINI_INFER_HOME"):
        return Path(home)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "mini_infer"
    try:
        return Path.home() / ".cache" / "mini_infer"
    except RuntimeError as error:  # no $HOME, and a user id without an account, as in many containers
        raise ConfigError(f"there is no place for the cache: {error} Set MINI_INFER_HOME to a folder") from error
