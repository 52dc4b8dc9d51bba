"""Is the preview right? Its scores beside those of real runs, where a recipe names some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.preview.front import igd_plus, non_dominated, rank_correlation
from mergekit_bayes.preview.results import Point, Scale, number
from mergekit_bayes.recipe.preview import PreviewRecipe, ReferenceSpec

__all__ = ["against_references"]

Array: TypeAlias = NDArray[np.float64]


def against_references(
    recipe: PreviewRecipe, points: Sequence[Point], scale: Scale | None, tiers: Sequence[str]
) -> dict[str, Any]:
    """How far every tier and method is from the reference runs.

    Args:
        recipe: with its references.
        points: of the preview.
        scale: of base and experts; None where they were not evaluated, so that only ranks compare.
        tiers: those there are.

    Returns:
        As JSON: the runs; and for every tier and method the IGD+ to their front, the error at every reference that was
        previewed at the same weights, per task Spearman's correlation over these, and the regret of the weights that
        the preview would pick among them, by max-min and by mean. Empty without references.
    """
    if not recipe.references:
        return {}
    names, higher = recipe.task_names, [task.higher_is_better for task in recipe.tasks]
    real = np.array([[run.scores[name] for name in names] for run in recipe.references], dtype=np.float64)
    goodness = np.where(higher, 1.0, -1.0) * real if scale is None else scale.gains(real)
    found = {}
    for tier in tiers:
        methods = dict.fromkeys(point.method for point in points if tier in point.gains)
        found[tier] = {
            method: _compared(
                [p for p in points if p.method == method and tier in p.gains], tier, recipe, goodness, scale
            )
            for method in methods
        }
    return {"runs": [_run(run, names) for run in recipe.references], "tiers": found}


def _run(run: ReferenceSpec, names: Sequence[str]) -> dict[str, Any]:
    weights = {} if run.weights is None else {"weights": list(run.weights)}
    return {"name": run.name, **weights, "scores": {name: run.scores[name] for name in names}}


def _compared(
    points: Sequence[Point], tier: str, recipe: PreviewRecipe, real: Array, scale: Scale | None
) -> dict[str, Any]:
    names = recipe.task_names
    gains = np.stack([point.gains[tier] for point in points])
    front = real[non_dominated(real)]
    reachable = scale is not None and tier != "surrogate" and np.isfinite(gains).all(axis=1).any() and len(front)
    pairs = [(index, place) for index, run in enumerate(recipe.references) if (place := _same(run, points)) is not None]
    report: dict[str, Any] = {"igd_plus": igd_plus(gains, front) if reachable else None, "previewed": len(pairs)}
    if not pairs:
        return report
    runs, ours = real[[index for index, _ in pairs]], gains[[place for _, place in pairs]]
    if scale is not None:
        report["errors"] = [
            {"name": recipe.references[index].name, **_by_task(gap, names)}
            for (index, _), gap in zip(pairs, ours - runs, strict=True)
        ]
    report["spearman"] = _by_task(
        np.array([rank_correlation(a, b) for a, b in zip(ours.T, runs.T, strict=True)]), names
    )
    report["regret"] = {
        "max_min": _regret(ours.min(axis=1), runs.min(axis=1)),
        "mean": _regret(ours.mean(axis=1), runs.mean(axis=1)),
    }
    return report


def _same(run: ReferenceSpec, points: Sequence[Point]) -> int | None:
    """The point with the weights of a run."""
    if run.weights is None:
        return None
    for place, point in enumerate(points):
        if all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(run.weights, point.mix, strict=True)):
            return place
    return None


def _regret(ours: Array, real: Array) -> float | None:
    """What the real run at the weights that look best here falls short of the best real run."""
    if not np.isfinite(ours).any():
        return None
    return number(float(np.nanmax(real) - real[int(np.nanargmax(ours))]))


def _by_task(values: Array, names: Sequence[str]) -> Mapping[str, float | None]:
    return {name: number(float(value)) for name, value in zip(names, values, strict=True)}
