"""The front as a page to look around in: which weights and which scores are behind every point."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.preview.figures import COLOURS, WORDS, gains_of, placed_scores, points_of
from mergekit_bayes.preview.results import TIERS, number
from mergekit_bayes.recipe.preview import PreviewRecipe

__all__ = ["check_page", "write_page"]

Array: TypeAlias = NDArray[np.float64]

_FAINT = 0.35  # opacity of points that are dominated


def check_page(recipe: PreviewRecipe) -> None:
    """Refuses a page where it cannot be made.

    Raises:
        RecipeError: plotly is not installed.
    """
    if recipe.output.html and find_spec("plotly") is None:
        message = "needs plotly, not installed here; pip install 'mergekit-bayes[preview-html]', or leave it out."
        raise RecipeError(recipe.describe(("output", "html"), message))


def write_page(content: Mapping[str, Any], path: Path) -> None:
    """Writes a page that needs no network; the same content gives the same page.

    Two tasks are a plane and three a space; more are a line per point, from task to task.

    Args:
        content: of front.json.
        path: the file.
    """
    from plotly.graph_objects import Figure

    tier = next((tier for tier in TIERS if tier in content["tiers"]), None)
    figure = Figure(layout={"title": {"text": _title(content, tier)}, "height": 720, "template": "plotly_white"})
    if tier is not None:
        figure.add_traces([*_methods(content, tier), *_models(content, tier)])
        figure.update_layout(_axes(content, tier))
    text = figure.to_html(include_plotlyjs=True, full_html=True, div_id="front", config={"displaylogo": False})
    path.write_text(text, encoding="utf-8")


def _title(content: Mapping[str, Any], tier: str | None) -> str:
    if tier is None:
        return "nothing was evaluated"
    count = content["tiers"][tier]["points"]
    return f"{count} mixes of {len(content['models'])} models, {tier}: 0 is the base, 1 the expert of each task"


def _tasks(content: Mapping[str, Any]) -> list[str]:
    return [task["name"] for task in content["tasks"]]


def _axes(content: Mapping[str, Any], tier: str) -> dict[str, Any]:
    names = [f"{html.escape(name)}{WORDS[tier]}" for name in _tasks(content)]
    if len(names) > 3:
        return {"yaxis": {"title": {"text": f"gain{WORDS[tier]}"}}}
    titles = {axis: {"title": {"text": name}} for axis, name in zip(("xaxis", "yaxis", "zaxis"), names, strict=False)}
    return titles if len(names) == 2 else {"scene": titles}


def _methods(content: Mapping[str, Any], tier: str) -> Iterator[Any]:
    """Two traces of every method: its points on the front of all methods, and the rest, faint."""
    tasks = _tasks(content)
    for index, method in enumerate(content["methods"]):
        of_method = points_of(content, method, tier)
        for best in (True, False):
            points = [point for point in of_method if (point[tier]["dominated"] is False) == best]
            look = _Look(
                html.escape(method) if best else f"{html.escape(method)}, dominated",
                COLOURS[index % len(COLOURS)],
                size=7 if best else 4,
                opacity=1.0 if best else _FAINT,
            )
            yield _trace(gains_of(points, tier, tasks), [_told(content, point, tier) for point in points], tasks, look)


def _models(content: Mapping[str, Any], tier: str) -> Iterator[Any]:
    """The base; and, beside scores of models, the experts and the reference runs."""
    tasks = _tasks(content)
    yield _trace(np.zeros((1, len(tasks))), ["base"], tasks, _Look("base", "#555555", "diamond", size=9))
    if tier == "surrogate" or content["experts"] is None:
        return
    runs = {run["name"]: run["scores"] for run in content["references"].get("runs", [])}
    for label, models, look in (
        ("experts", content["experts"], ("#e69f00", "diamond")),
        ("reference runs", runs, ("#000000", "x")),
    ):
        if models:
            texts = [html.escape(name) for name in models]
            yield _trace(placed_scores(content, list(models.values())), texts, tasks, _Look(label, *look))


def _told(content: Mapping[str, Any], point: Mapping[str, Any], tier: str) -> str:
    """What a point says of itself: its weights, its scores."""
    weights = zip(content["models"], point["weights"], strict=True)
    lines = [f"<b>{html.escape(point['method'])}</b>"]
    lines += [f"{html.escape(Path(model).name)}: {weight:g}" for model, weight in weights]
    for task in content["tasks"]:
        score = point[tier]["scores"][task["name"]]
        word = "predicted increase of the loss" if tier == "surrogate" else task["metric"]
        lines.append(f"{html.escape(task['name'])}, {word}: {'no number' if score is None else f'{score:.4g}'}")
    return "<br>".join(lines)


@dataclass(frozen=True)
class _Look:
    """How a trace is drawn, and what the legend calls it."""

    label: str
    colour: str
    symbol: str = "circle"
    size: int = 7
    opacity: float = 1.0


def _trace(gains: Array, texts: Sequence[str], tasks: Sequence[str], look: _Look) -> Any:
    """Points where there are two or three tasks, else a line across all tasks for each."""
    from plotly.graph_objects import Scatter, Scatter3d

    shared = {"name": look.label, "opacity": look.opacity, "hoverinfo": "text"}
    marker = {"color": look.colour, "size": look.size, "symbol": look.symbol}
    if len(tasks) <= 3:
        kind = Scatter if len(tasks) == 2 else Scatter3d
        columns = dict(zip("xyz", _plain(gains.T), strict=False))
        return kind(**columns, mode="markers", marker=marker, text=list(texts), **shared)
    # one trace for all lines, with a gap after each
    rows = [[*row, None] for row in _plain(gains)]
    return Scatter(
        x=[*tasks, None] * len(rows),
        y=[value for row in rows for value in row],
        text=[text for text in texts for _ in range(len(tasks) + 1)],
        mode="lines+markers",
        line={"color": look.colour, "width": 1},
        marker=marker,
        **shared,
    )


def _plain(values: Array) -> list[list[float | None]]:
    return [[number(value) for value in row] for row in values]
