"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.disk import disk_errors

__all__ = ["draw_curve"]

_RECENT = 0.1  # share of the run over which the smooth line averages
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_curve(path: Path, rows: Sequence[Mapping[str, Any]], *, unit: str) -> None:
    """Draws training loss, smoothed too, the loss of every held-out data set, and the learning rate below.

    Args:
        path: a PNG file; the same log gives the same picture.
        rows: of the log.
        unit: what the loss is a mean over, `token` or `example`.

    Raises:
        OutputError: the disk failed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it keeps figures and looks for a display
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, losses = _series(rows, "loss")
    loss.plot(steps, losses, color="#0072b2", alpha=0.3, linewidth=1)
    loss.plot(steps, _smooth(losses), color="#0072b2", linewidth=2, label="training")
    for number, (name, (at, values)) in enumerate(_held_out(rows).items()):
        loss.plot(at, values, "o-", color=_COLOURS[number % len(_COLOURS)], linewidth=1.5, markersize=4, label=name)
    loss.set_ylabel(f"loss (nats per {unit})")
    loss.legend(frameon=False)
    rate.plot(*_series(rows, "learning_rate"), color="#555555", linewidth=1.5)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer step")
    rate.set_ylim(bottom=0)
    for axes in (loss, rate):
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with disk_errors(path, "write"):
        figure.savefig(path, metadata={"Software": None})


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def _held_out(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, values in row.get("eval", {}).items():
            if isinstance(values.get("loss"), int | float):
                steps, losses = found.setdefault(name, ([], []))
                steps.append(row["step"])
                losses.append(values["loss"])
    return found


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last few values at every place, few at the start."""
    width = max(1, round(len(values) * _RECENT))
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - width) : end]
        means.append(sum(recent) / len(recent))
    return means
