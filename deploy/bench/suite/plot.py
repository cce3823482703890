"""Plots as SVG, by matplotlib: an optional extra, since a server has no use for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from deploy.bench.suite.errors import BenchmarkError
from deploy.bench.suite.result import Plot

# Readable in a page's column, and the same file for the same numbers.
_INCHES = (7.0, 4.2)
_REPRODUCIBLE = {"svg.hashsalt": "headwise", "svg.fonttype": "none"}


def require_matplotlib() -> None:
    """Raise `BenchmarkError` where plots cannot be drawn: before measuring, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError(
            "plots need matplotlib, which is not installed: pip install 'headwise-cluster[bench]', "
            "or give --no-plot"
        )


def save(plot: Plot, path: Path) -> None:
    """Draw `plot` into an SVG file. Raises `OSError` where it cannot be written."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_REPRODUCIBLE):
        figure = Figure(figsize=_INCHES, layout="constrained")
        axes = figure.subplots()
        for series in plot.series:
            style = {"linestyle": "--"} if series.dashed else {"marker": "o", "markersize": 4}
            axes.plot(series.x, series.y, label=series.label, **style)
        if plot.log_x:
            axes.set_xscale("log", base=2)
        if plot.log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None})
