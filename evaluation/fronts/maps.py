"""Triples of tasks as maps over the simplex of weights: merges of every family beside real training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Results: TypeAlias = Mapping[str, Any]
Array: TypeAlias = NDArray[np.float64]
LOWEST, HIGHEST = -1.0, 1.0
"""Of the colours: one expert's gain below and above the base."""
SHOWN: Mapping[str, Callable[[Array], Array]] = {
    "worst task": lambda scores: scores.min(axis=1),
    "mean of the tasks": lambda scores: scores.mean(axis=1),
}


def has_triples(results: Results) -> bool:
    return bool(_triples(results))


def _triples(results: Results) -> list[Results]:
    return [found for found in results["groups"].values() if len(found["tasks"]) == 3]


def maps(results: Results, path: Path) -> None:
    """Draw the worst task and the mean of the tasks over the weights, averaged over seeds, a column for every row."""
    import matplotlib

    matplotlib.use("Agg")
    import mpltern  # noqa: F401 - registers the projection
    from matplotlib import pyplot

    triples = _triples(results)
    across, down = len(triples[0]["points"]), len(triples) * len(SHOWN)
    drawing = pyplot.figure(figsize=(2.5 * across, 2.55 * down + 0.6))
    for index, (found, name) in enumerate((found, name) for found in triples for name in SHOWN):
        height = (1 - 0.12) / down
        drawing.text(0.01, 1 - (index + 0.5) * height, name, rotation=90, va="center", fontsize=10)
        for column, row in enumerate(found["points"]):
            place = (0.035 + 0.965 * column / across, 1 - (index + 0.86) * height, 0.87 / across, 0.64 * height)
            axes = drawing.add_axes(place, projection="ternary")
            drawn = _map(axes, found, row, SHOWN[name])
            axes.set_title(row, fontsize=10, pad=20)
    bar = drawing.add_axes((0.3, 0.05, 0.4, 0.015))
    drawing.colorbar(drawn, cax=bar, orientation="horizontal", extend="min").ax.tick_params(labelsize=7)
    bar.set_title("0: base, 1: the task's expert; framed: where the worst task is best", fontsize=8)
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def _map(axes: Any, found: Results, row: str, shown: Callable[[Array], Array]) -> Any:
    """One map, its corners the experts; every model of the design has its number."""
    weights = np.array([*found["weights"].values(), *np.eye(3)])
    scores = np.concatenate([_averaged(found, row), np.mean(found["experts"], axis=0)])
    values = shown(scores)
    levels = np.linspace(LOWEST, HIGHEST, 21)
    drawn = axes.tricontourf(*weights.T, values, levels=levels, cmap="RdBu", extend="min")
    best = int(SHOWN["worst task"](scores).argmax())
    for index, (place, value) in enumerate(zip(weights, values, strict=True)):
        box = _BOX | {"linewidth": 1.5 if index == best else 0}
        axes.text(*place, f"{value:.2f}", fontsize=7, ha="center", va="center", bbox=box)
    aligned = (("center", "bottom"), ("left", "top"), ("right", "top"))
    for corner, task, (ha, va) in zip(np.eye(3), found["tasks"], aligned, strict=True):
        axes.text(*(corner + 0.1 * (corner - 1 / 3)), task, fontsize=8, ha=ha, va=va)
    for axis in (axes.taxis, axes.laxis, axes.raxis):
        axis.set_ticks([])
    return drawn


_BOX = {"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.8}


def _averaged(found: Results, row: str) -> Array:
    """Scores of one row averaged over seeds, shape (weights, tasks)."""
    seeds: Sequence[Mapping[str, Sequence[float]]] = found["points"][row]
    return np.array([np.mean([seed[weights] for seed in seeds], axis=0) for weights in found["weights"]])
