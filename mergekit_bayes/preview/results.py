"""What a preview found, as plain data: every point with its scores, and what the front of each tier says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.preview import front
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.recipe.preview import PreviewRecipe

__all__ = ["TIERS", "Point", "Scale", "front_of", "points_as_data", "scores_of"]

Array: TypeAlias = NDArray[np.float64]

TIERS = ("evaluated", "fitted", "surrogate")
"""What scores come from, most trusted first."""


@dataclass(eq=False)
class Point:
    """One mix of one method.

    Attributes:
        method: what plots and tables call it.
        mix: its weights.
        scores: by tier, one per task: in the task's metric where it was evaluated or fitted, the predicted increase of
            the loss over the expert's for the surrogate. NaN where there is none.
        gains: by tier, the same on the scale of `Scale`: more is better.
        dominated: by tier, whether another point of any method dominates it.
        seconds: of evaluation.
        error: why evaluating it failed.
    """

    method: str
    mix: Mix
    scores: dict[str, Array] = field(default_factory=dict)
    gains: dict[str, Array] = field(default_factory=dict)
    dominated: dict[str, bool] = field(default_factory=dict)
    seconds: float | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Scale:
    """Brings scores to one scale: 0 is the base, 1 what each task's own expert reaches.

    Attributes:
        base: scores of the base, shape (tasks,).
        experts: the score of each task's own expert, shape (tasks,).
        higher_is_better: one per task.
    """

    base: Array
    experts: Array
    higher_is_better: tuple[bool, ...]

    def gains(self, scores: Array) -> Array:
        """Scores of shape (points, tasks) or (tasks,) on that scale."""
        turned = [front.oriented(each, self.higher_is_better) for each in (scores, self.base, self.experts)]
        return front.normalised(turned[0], turned[1], turned[2])

    @property
    def hopeless(self) -> list[int]:
        """Tasks whose expert is no better than the base, so that the scale says little."""
        turned = [front.oriented(each, self.higher_is_better) for each in (self.base, self.experts)]
        return [int(index) for index in np.flatnonzero(~(turned[1] > turned[0]))]


def scores_of(recipe: PreviewRecipe, record: Mapping[str, Any] | None) -> Array:
    """The scores of an evaluated mix in the metrics of the tasks, shape (tasks,); NaN where there are none."""
    found = {} if record is None else record.get("scores", {})
    named = zip(recipe.task_names, recipe.tasks, strict=True)
    values = [found.get(name, {}).get(task.metric) for name, task in named]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def front_of(points: Sequence[Point], tier: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Marks dominated points of a tier and says what is on its front.

    Args:
        points: of all methods; those without the tier are passed over.
        tier: one of `TIERS`.
        tasks: their names.

    Returns:
        For all methods together and for each, as JSON: number of points, hypervolume over the base, and the places in
        `points` of knee, max-min and best points.
    """
    there = [index for index, point in enumerate(points) if tier in point.gains]
    gains = np.array([points[index].gains[tier] for index in there]).reshape(len(there), len(tasks))
    for index, best in zip(there, front.non_dominated(gains), strict=True):
        points[index].dominated[tier] = not best
    methods = dict.fromkeys(points[index].method for index in there)
    return {
        "reference_point": [0.0] * len(tasks),
        **_measures(gains, there, tasks),
        "methods": {
            method: _measures(
                gains[[points[index].method == method for index in there]],
                [index for index in there if points[index].method == method],
                tasks,
            )
            for method in methods
        },
    }


def _measures(gains: Array, places: Sequence[int], tasks: Sequence[str]) -> dict[str, Any]:
    def place(found: int | None) -> int | None:
        return None if found is None else places[found]

    return {
        "points": len(places),
        "not_a_number": int((~np.isfinite(gains).all(axis=1)).sum()) if len(places) else 0,
        "hypervolume": front.hypervolume(gains, np.zeros(len(tasks))),
        "max_min": place(front.max_min(gains)) if len(places) else None,
        "knee": place(front.knee(gains)) if len(places) else None,
        "best": {task: place(front.task_best(gains, t)) if len(places) else None for t, task in enumerate(tasks)},
    }


def points_as_data(points: Sequence[Point], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Points as JSON; a number that is none is null."""
    return [
        {
            "method": point.method,
            "weights": list(point.mix),
            **{tier: _tier(point, tier, tasks) for tier in TIERS if tier in point.gains},
            **({} if point.seconds is None else {"seconds": round(point.seconds, 4)}),
            **({} if point.error is None else {"error": point.error}),
        }
        for point in points
    ]


def _tier(point: Point, tier: str, tasks: Sequence[str]) -> Mapping[str, Any]:
    scores, gains = point.scores[tier], point.gains[tier]
    return {
        "scores": {task: number(value) for task, value in zip(tasks, scores, strict=True)},
        "normalised": {task: number(value) for task, value in zip(tasks, gains, strict=True)},
        "dominated": point.dominated.get(tier),
    }


def number(value: float) -> float | None:
    """A finite number, or nothing."""
    return float(value) if math.isfinite(value) else None
