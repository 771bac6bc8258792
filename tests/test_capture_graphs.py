"""The warm-up script, as far as it goes without a GPU."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

from scripts.capture_graphs import plot


def test_the_plot_shades_what_rounding_up_loses() -> None:
    """Against the sizes that were measured, those without a bucket too; where a larger bucket is cheaper, nothing."""
    pyplot, figure, axes = MagicMock(), MagicMock(), MagicMock()
    pyplot.subplots.return_value = figure, axes
    buckets = {2: 1.0, 4: 3.0, 8: 2.5}
    plot(pyplot, buckets, {**buckets, 6: 2.25}, Path("plot.png"))
    rows, ideal, lost = axes.fill_between.call_args.args
    assert list(rows) == [*range(1, 9)]
    assert ideal == [1.0, 1.0, 2.0, 3.0, 2.625, 2.25, 2.375, 2.5]
    assert lost == [1.0, 1.0, 2.5, 3.0, 2.625, 2.5, 2.5, 2.5]
    assert figure.savefig.call_args.args == (Path("plot.png"),)
