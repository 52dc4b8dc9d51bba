"""Is the preview right? Its scores beside those of real runs, where a recipe names some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.preview.costs import source_seconds
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.front import igd_plus, non_dominated, rank_correlation
from mergekit_bayes.preview.results import Point, Scale, number, scores_of
from mergekit_bayes.preview.sweep import Group
from mergekit_bayes.recipe.preview import PreviewRecipe

__all__ = ["ReferenceRun", "against_references", "reference_runs"]

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """A real run with its scores.

    Attributes:
        name: what plots and tables call it.
        weights: the mix it stands for; None for none.
        model: what was evaluated; None where the recipe gives the scores.
        scores: in the metrics of the tasks, shape (tasks,); NaN where evaluation has not given them.
        minutes: what it cost; None if nobody says.
        error: why it could not be evaluated.
    """

    name: str
    weights: Mix | None
    model: str | None
    scores: Array
    minutes: float | None
    error: str | None = None


def reference_runs(
    recipe: PreviewRecipe, groups: Sequence[Group], records: Mapping[str, Mapping[str, Any]]
) -> list[ReferenceRun]:
    """The references of a recipe, in its order.

    Args:
        recipe: of the preview.
        groups: what was to be evaluated, those references among it that are models.
        records: evaluations by key.
    """
    evaluated = {group.reference: group for group in groups if group.reference is not None}
    runs = []
    for index, spec in enumerate(recipe.references):
        if spec.model is None:
            scores = np.array([spec.scores[name] for name in recipe.task_names], dtype=np.float64)
            runs.append(ReferenceRun(spec.name, spec.weights, None, scores, spec.minutes))
            continue
        group = evaluated.get(index)
        record = None if group is None else records.get(group.keys[0])
        error = None if record is None else record.get("error")
        minutes = spec.minutes if spec.minutes is not None or group is None else _minutes(group)
        runs.append(ReferenceRun(spec.name, spec.weights, spec.model, scores_of(recipe, record), minutes, error))
    return runs


def _minutes(group: Group) -> float | None:
    """What training a reference took, as far as its folder tells."""
    seconds = source_seconds(group.method.plan.sources[0].places[0]).get("training")
    return None if seconds is None else seconds / 60


def against_references(
    runs: Sequence[ReferenceRun],
    points: Sequence[Point],
    *,
    recipe: PreviewRecipe,
    scale: Scale | None,
    tiers: Sequence[str],
) -> dict[str, Any]:
    """How far every tier and method is from the reference runs.

    Args:
        runs: of `reference_runs`; those without scores are listed and not compared.
        points: of the preview.
        recipe: of the preview.
        scale: of base and experts; None where they were not evaluated, so that only ranks compare.
        tiers: those there are.

    Returns:
        As JSON: the runs; and for every tier and method the IGD+ to their front, the error at every reference that was
        previewed at the same weights, per task Spearman's correlation over these, and the regret of the weights that
        the preview would pick among them, by max-min and by mean. Empty without references.
    """
    if not runs:
        return {}
    names, higher = recipe.task_names, [task.higher_is_better for task in recipe.tasks]
    known = [run for run in runs if np.isfinite(run.scores).all()]
    real = np.array([run.scores for run in known]).reshape(len(known), len(names))
    goodness = np.where(higher, 1.0, -1.0) * real if scale is None else scale.gains(real)
    found: dict[str, Any] = {}
    for tier in tiers if known else ():
        methods = dict.fromkeys(point.method for point in points if tier in point.gains)
        found[tier] = {
            method: _compared(
                [p for p in points if p.method == method and tier in p.gains],
                tier,
                runs=known,
                real=goodness,
                names=names,
                scale=scale,
            )
            for method in methods
        }
    return {"runs": [_run(run, names) for run in runs], "tiers": found}


def _run(run: ReferenceRun, names: Sequence[str]) -> dict[str, Any]:
    told = {"weights": None if run.weights is None else list(run.weights), "model": run.model, "error": run.error}
    known = {key: value for key, value in told.items() if value is not None}
    return {"name": run.name, **known, "scores": _by_task(run.scores, names)}


def _compared(
    points: Sequence[Point],
    tier: str,
    *,
    runs: Sequence[ReferenceRun],
    real: Array,
    names: Sequence[str],
    scale: Scale | None,
) -> dict[str, Any]:
    gains = np.stack([point.gains[tier] for point in points])
    front = real[non_dominated(real)]
    reachable = scale is not None and tier != "surrogate" and np.isfinite(gains).all(axis=1).any() and len(front)
    pairs = [(index, place) for index, run in enumerate(runs) if (place := _same(run, points)) is not None]
    report: dict[str, Any] = {"igd_plus": igd_plus(gains, front) if reachable else None, "previewed": len(pairs)}
    if not pairs:
        return report
    theirs, ours = real[[index for index, _ in pairs]], gains[[place for _, place in pairs]]
    if scale is not None:
        report["errors"] = [
            {"name": runs[index].name, **_by_task(gap, names)}
            for (index, _), gap in zip(pairs, ours - theirs, strict=True)
        ]
    report["spearman"] = _by_task(
        np.array([rank_correlation(a, b) for a, b in zip(ours.T, theirs.T, strict=True)]), names
    )
    report["regret"] = {
        "max_min": _regret(ours.min(axis=1), theirs.min(axis=1)),
        "mean": _regret(ours.mean(axis=1), theirs.mean(axis=1)),
    }
    return report


def _same(run: ReferenceRun, points: Sequence[Point]) -> int | None:
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
