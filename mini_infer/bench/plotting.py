"""Pictures of what was measured, with matplotlib, which nothing else needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mini_infer.exceptions import ConfigError


def load_pyplot(path: Path) -> Any:
    """``matplotlib.pyplot``. To be called before anything is measured, which may take minutes.

    Args:
        path: Where the picture will go.

    Raises:
        ConfigError: matplotlib is not installed, or there is no such folder.
    """
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"the plot cannot go to {path}: there is no folder {path.parent}")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: pip install matplotlib, or leave out --plot") from error
    return pyplot
