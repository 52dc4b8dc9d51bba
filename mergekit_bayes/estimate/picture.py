"""How much the estimate moved, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.disk import disk_errors
from mergekit_bayes.precision.convergence import Change

__all__ = ["draw_convergence"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MOST = 0.9  # quantile of the tensors that move most


def draw_convergence(path: Path, series: Mapping[str, Sequence[Change]], *, unit: str) -> None:
    """Draws how far the estimate moved since half of the units: the median tensor, and one that moves more than most.

    Args:
        path: a PNG file; the same numbers give the same picture.
        series: by what it is called; one per group of targets and pass.
        unit: `token` or `example`.

    Raises:
        OutputError: the disk failed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it keeps figures and looks for a display
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (name, changes) in enumerate(series.items()):
        units = [change.units for change in changes]
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(units, [change.median for change in changes], "o-", color=colour, markersize=4, label=name)
        axes.plot(units, [_upper(change) for change in changes], "--", color=colour, linewidth=1)
    if any(len(changes) > 1 for changes in series.values()):
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{unit}s looked at")
    axes.set_ylabel("change since half of them, relative\n(dashed: nine tensors in ten move less)")
    if len(series) > 1:
        axes.legend(frameon=False)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with disk_errors(path, "write"):
        figure.savefig(path, metadata={"Software": None})


def _upper(change: Change) -> float:
    values = sorted(change.by_name.values())
    return values[min(len(values) - 1, int(_MOST * len(values)))] if values else 0.0
