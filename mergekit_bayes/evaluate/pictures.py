"""Scores as bars with intervals, and reliability diagrams; the same results give the same pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.disk import disk_errors
from mergekit_bayes.evaluate.table import heading

__all__ = ["draw_reliability", "draw_scores"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
"""Of data sets; told apart by colour-blind people too (Okabe and Ito)."""

_COLUMNS = 3


def draw_scores(path: Path, content: Mapping[str, Any]) -> None:
    """Draws a panel for each metric, a group of bars for each model, a bar for each data set.

    Args:
        path: a PNG file.
        content: of `results.json`.

    Raises:
        OutputError: the disk failed.
    """
    scores, names = content["scores"], [data["name"] for data in content["data"]]
    metrics = list(dict.fromkeys(m for found in scores.values() for own in found.values() for m in own))
    columns = min(_COLUMNS, len(metrics))
    lines = -(-len(metrics) // columns)
    height = 0.9 + 0.28 * len(scores) * max(1.0, 0.7 * len(names))
    figure = _figure((5.0 * columns, max(2.6, height) * lines))
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    for axes, metric in zip(panels, metrics, strict=False):
        for number, name in enumerate(names):
            _bars(axes, [found[name].get(metric) for found in scores.values()], number, len(names))
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set_xlabel(heading(metric))
        axes.grid(visible=True, axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _hide(panels[len(metrics) :])
    panels[0].invert_yaxis()
    if len(names) > 1:
        figure.legend(*_keys(names), loc="outside upper center", ncols=len(names), frameon=False)
    _save(figure, path)


def _bars(axes: Any, scores: Sequence[Mapping[str, Any] | None], number: int, count: int) -> None:
    """The bars of one data set, each with the interval of its score."""
    thickness = 0.8 / count
    for place, score in enumerate(scores):
        if score is None or score["value"] is None:
            continue
        at = place + (number - (count - 1) / 2) * thickness
        colour = COLOURS[number % len(COLOURS)]
        axes.barh(at, score["value"], height=0.9 * thickness, color=colour)
        if score["low"] is not None:
            axes.plot([score["low"], score["high"]], [at, at], color="#000000", linewidth=1)


def _keys(names: Sequence[str]) -> tuple[list[Any], list[str]]:
    from matplotlib.patches import Patch

    return [Patch(color=COLOURS[number % len(COLOURS)]) for number in range(len(names))], list(names)


def draw_reliability(path: Path, content: Mapping[str, Any]) -> None:
    """Draws a reliability diagram for each model: accuracy over confidence, the area of a point for its rows.

    Args:
        path: a PNG file.
        content: of `results.json`, of classifiers or questions.

    Raises:
        OutputError: the disk failed.
    """
    found = content["reliability"]
    columns = min(_COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure = _figure((3.6 * columns, 3.6 * lines))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    names = [data["name"] for data in content["data"]]
    for axes, (title, of_data) in zip(panels, found.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
        for number, name in enumerate(names):
            _points(axes, of_data[name], COLOURS[number % len(COLOURS)])
        axes.set_title(title, fontsize=9)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
    _hide(panels[len(found) :])
    figure.supxlabel("confidence")
    figure.supylabel("accuracy")
    if len(names) > 1:
        figure.legend(*_keys(names), loc="outside upper center", ncols=len(names), frameon=False)
    _save(figure, path)


def _points(axes: Any, bins: Sequence[Mapping[str, float]], colour: str) -> None:
    total = sum(each["rows"] for each in bins)
    sure, right = [each["confidence"] for each in bins], [each["accuracy"] for each in bins]
    axes.plot(sure, right, color=colour, linewidth=1, alpha=0.3)
    axes.scatter(sure, right, s=[8 + 200 * each["rows"] / total for each in bins], color=colour, alpha=0.6)


def _hide(panels: Iterable[Any]) -> None:
    for axes in panels:
        axes.set_visible(False)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it keeps figures and looks for a display
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with disk_errors(path, "write"):
        figure.savefig(path, metadata={"Software": None})
