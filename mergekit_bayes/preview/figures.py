"""The front as a picture: curves for two tasks, maps over the simplex for three, parallel coordinates for more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.preview.results import TIERS

__all__ = ["COLOURS", "WORDS", "draw", "gains_of", "placed_scores", "points_of"]

Array: TypeAlias = NDArray[np.float64]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of methods, in order (Okabe and Ito 2008)."""
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
WORDS = {"evaluated": "", "fitted": "", "surrogate": " (predicted)"}
"""What axes add to a tier's gains."""


def draw(content: Mapping[str, Any], path: Path, *, suffix: str) -> None:
    """Draws a preview; the same content gives the same picture.

    Args:
        content: of front.json.
        path: the file.
        suffix: `png` or `svg`.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tier = next((tier for tier in TIERS if tier in content["tiers"]), None)
    tasks = [task["name"] for task in content["tasks"]]
    # maps over the simplex have their places: to let matplotlib find them takes seconds
    layout: Literal["constrained"] | None = None if len(tasks) == 3 else "constrained"
    figure = Figure(figsize=(9, 6.2) if len(tasks) == 3 else (6.4, 4.8), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    if tier is None:
        figure.text(0.5, 0.5, "nothing was evaluated", ha="center")
    elif len(tasks) == 2:
        _curves(figure.subplots(), content, tier, (0, 1))
        _legend(figure)
    elif len(tasks) == 3:
        _three(figure, content, tier)
    else:
        _parallel(figure.subplots(), content, tier)
        _legend(figure)
    # no dates, no random names: the same content is the same file
    with mpl.rc_context({"svg.hashsalt": "mergekit_bayes"}):
        metadata = {"Date": None} if suffix == "svg" else {"Software": None}
        figure.savefig(path, format=suffix, metadata=metadata)


def points_of(content: Mapping[str, Any], method: str, tier: str) -> list[Mapping[str, Any]]:
    """The points of one method that have scores of a tier."""
    return [point for point in content["points"] if point["method"] == method and tier in point]


def gains_of(points: Sequence[Mapping[str, Any]], tier: str, tasks: Sequence[str]) -> Array:
    """What points gain, shape (points, tasks): 0 is the base, 1 the task's expert; NaN where there is no number."""
    values = [[point[tier]["normalised"][task] for task in tasks] for point in points]
    return np.array(values, dtype=np.float64).reshape(len(points), len(tasks))


def _curves(axes: Any, content: Mapping[str, Any], tier: str, pair: tuple[int, int]) -> None:
    """Two tasks against each other; points on the front of all tasks are filled, the rest is faint."""
    tasks = [task["name"] for task in content["tasks"]]
    chosen = [tasks[pair[0]], tasks[pair[1]]]
    for index, method in enumerate(content["methods"]):
        points = points_of(content, method, tier)
        gains = gains_of(points, tier, chosen)
        best = np.array([point[tier]["dominated"] is False for point in points], dtype=bool)
        style = {"marker": _MARKS[index % len(_MARKS)], "linestyle": "none", "color": COLOURS[index % len(COLOURS)]}
        axes.plot(*gains[~best].T, markersize=3.5, alpha=0.3, **style)
        order = np.argsort(gains[best][:, 0])
        axes.plot(*gains[best][order].T, markersize=5, label=method, **style)
        if len(tasks) == 2:
            axes.plot(*gains[best][order].T, color=style["color"], linewidth=1, alpha=0.6)
    _marks(axes, content, tier, pair)
    words = WORDS[tier]
    axes.set_xlabel(f"{chosen[0]}{words}: 0 base, 1 expert", fontsize=9)
    axes.set_ylabel(f"{chosen[1]}{words}", fontsize=9, labelpad=1)
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _marks(axes: Any, content: Mapping[str, Any], tier: str, pair: tuple[int, int]) -> None:
    """The base, the experts and the references."""
    axes.plot(0, 0, marker="*", markersize=12, color="#555555", linestyle="none", label="base")
    if tier != "surrogate" and content["experts"]:
        named = zip(content["tasks"], placed_scores(content, list(content["experts"].values())), strict=False)
        for index, (_, gains) in enumerate(named):
            label = "experts" if index == 0 else None
            axes.plot(*gains[list(pair)], marker="*", markersize=12, color="#e69f00", linestyle="none", label=label)
    references = [reference["scores"] for reference in content.get("references", {}).get("runs", [])]
    for index, gains in enumerate(placed_scores(content, references) if tier != "surrogate" else []):
        label = "reference runs" if index == 0 else None
        axes.plot(*gains[list(pair)], marker="x", markersize=7, color="#000000", linestyle="none", label=label)


def placed_scores(content: Mapping[str, Any], scores: Sequence[Mapping[str, float | None]]) -> Array:
    """Scores of models on the scale of base and experts, shape (models, tasks); NaN where there is no such scale."""
    tasks = content["tasks"]
    rows = np.array([[row[task["name"]] for task in tasks] for row in scores], dtype=np.float64)
    if content["base"] is None or not len(rows):
        return np.full((len(rows), len(tasks)), np.nan)
    base = np.array([content["base"][task["name"]] for task in tasks], dtype=np.float64)
    own = np.array([content["experts"][task["expert"]][task["name"]] for task in tasks], dtype=np.float64)
    sign = np.array([1.0 if task["better"] == "higher" else -1.0 for task in tasks])
    gap = np.abs(own - base)
    placed: Array = sign * (rows.reshape(-1, len(tasks)) - base) / np.where(gap > 0, gap, np.nan)
    return placed


def _three(figure: Any, content: Mapping[str, Any], tier: str) -> None:
    """Above, every task over the simplex of weights, for the method with the largest hypervolume; below, the front."""
    import mpltern  # noqa: F401 - registers the projection

    tasks = [task["name"] for task in content["tasks"]]
    method = max(content["tiers"][tier]["methods"].items(), key=lambda item: item[1]["hypervolume"])[0]
    points = [point for point in points_of(content, method, tier) if abs(sum(point["weights"]) - 1) < 1e-9]
    mapped = len(content["models"]) == 3 and len(points) >= 4
    for column, task in enumerate(tasks if mapped else []):
        axes = figure.add_axes((0.05 + 0.325 * column, 0.6, 0.19, 0.28), projection="ternary")
        bar = figure.add_axes((0.27 + 0.325 * column, 0.7, 0.01, 0.18))
        _map(axes, bar, content, points, tier, task)
    top = 0.5 if mapped else 0.95
    for column, pair in enumerate(((0, 1), (1, 2), (2, 0))):
        _curves(figure.add_axes((0.085 + 0.325 * column, 0.15, 0.23, top - 0.15)), content, tier, pair)
    if mapped:
        title = f"{method}: share of each expert's gain{WORDS[tier]} over the weights; below, all mixes"
        figure.suptitle(title, fontsize=10)
    _legend(figure)


def _map(
    axes: Any, beside: Any, content: Mapping[str, Any], points: Sequence[Mapping[str, Any]], tier: str, task: str
) -> None:
    weights = np.array([point["weights"] for point in points]).T
    values = gains_of(points, tier, [task])[:, 0]
    known = np.isfinite(values)
    if known.sum() < 4:
        return
    filled = axes.tricontourf(*weights[:, known], values[known], levels=12, cmap="viridis")
    axes.tricontour(*weights[:, known], values[known], levels=[0.0], colors="white", linewidths=1)
    places = content["tiers"][tier]["methods"][points[0]["method"]]
    best = places["max_min"]
    if best is not None:
        axes.plot(*[[weight] for weight in content["points"][best]["weights"]], "*", color="#d55e00", markersize=11)
    names = [Path(model).name for model in content["models"]]
    axes.set_tlabel(f"all {names[0]}", fontsize=8)
    axes.set_llabel(f"all {names[1]}", fontsize=8)
    axes.set_rlabel(f"all {names[2]}", fontsize=8)
    for axis in (axes.taxis, axes.laxis, axes.raxis):
        axis.set_ticks([0.0, 0.5, 1.0])
    axes.tick_params(labelsize=6)
    bar = axes.figure.colorbar(filled, cax=beside)
    bar.set_label(f"gain in {task}", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _parallel(axes: Any, content: Mapping[str, Any], tier: str) -> None:
    """One line per point of the front, across all tasks."""
    tasks = [task["name"] for task in content["tasks"]]
    for index, method in enumerate(content["methods"]):
        points = [point for point in points_of(content, method, tier) if point[tier]["dominated"] is False]
        colour = COLOURS[index % len(COLOURS)]
        for place, gains in enumerate(gains_of(points, tier, tasks)):
            axes.plot(
                range(len(tasks)), gains, color=colour, alpha=0.5, linewidth=1, label=method if not place else None
            )
    axes.axhline(0, color="#555555", linewidth=1, linestyle="--", label="base")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel(f"gain{WORDS[tier]}: 0 base, 1 expert")
    axes.grid(visible=True, axis="x", alpha=0.5)


def _legend(figure: Any) -> None:
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside lower center",
            ncols=min(len(found), 5),
            frameon=False,
            fontsize=8,
        )
