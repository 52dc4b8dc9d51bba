"""From mean scores to what is reported of a group: fronts, their hypervolume, and how far merges are from training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, TypeAlias

import numpy as np

from evaluation.merging.summary import interval
from mergekit_bayes.preview.front import Points, hypervolume, igd_plus, max_min, non_dominated, normalised

Scores: TypeAlias = Mapping[str, float]
Rows: TypeAlias = Mapping[str, Mapping[str, Scores]]
"""Mean scores of one seed, more is better: by row, by model (weights or expert) and by task."""

REAL, ANCHORS, EXPERTS, EQUAL = "real training", "anchors", "experts", "equal weights"


def summary(tasks: Sequence[str], weights: Mapping[str, Sequence[float]], seeds: Sequence[Rows]) -> dict[str, Any]:
    """Everything that is reported of one group of tasks.

    Args:
        tasks: of the group, in the order of the weights.
        weights: by label.
        seeds: for every seed `anchors` (with the model `base`), `experts`, `real training` and the families.

    Returns:
        For every row, with its values by seed, their mean and Student's 95% interval: the hypervolume of its front,
        experts included, above the base; IGD+ of that front to the front of real training; mean score at the same
        weights minus that of real training (`error`) and its size averaged over weights and tasks
        (`absolute_error`). `picks` has for every row the weights at which its worst task is best, by seed, and their
        `regret`: what real training at the best such weights has there more in its worst task than at the weights that
        were picked; and the same of equal weights, where they are in the design. `points` are the normalised scores by
        seed, weights and task.
    """
    points = [_points(tasks, seed) for seed in seeds]
    rows = [row for row in points[0] if row != EXPERTS]
    return {
        "tasks": list(tasks),
        "weights": {name: [round(each, 4) for each in values] for name, values in weights.items()},
        "experts": [_listed(seed[EXPERTS]) for seed in points],
        "rows": {row: _row([_measures(seed, row) for seed in points]) for row in rows},
        "picks": {row: _picked(list(weights), found) for row, found in _picks(rows, weights, points).items()},
        "steps": _steps([row for row in rows if row != REAL], [_volumes(seed, rows) for seed in points]),
        "points": {row: [dict(zip(weights, _listed(seed[row]), strict=True)) for seed in points] for row in rows},
    }


def _points(tasks: Sequence[str], rows: Rows) -> dict[str, Points]:
    """Normalised scores by row, shape (models, tasks): 0 is the base, 1 the expert of the task."""
    base = np.array([rows[ANCHORS]["base"][task] for task in tasks])
    expert = np.array([rows[EXPERTS][task][task] for task in tasks])
    return {
        row: normalised(np.array([[each[task] for task in tasks] for each in models.values()]), base, expert)
        for row, models in rows.items()
        if row != ANCHORS
    }


def _measures(points: Mapping[str, Points], row: str) -> dict[str, float]:
    """Numbers of one row and seed."""
    real, here = points[REAL], points[row]
    front = np.concatenate([here, points[EXPERTS]])
    return {
        "hypervolume": hypervolume(front, np.zeros(front.shape[1])),
        "igd_plus": igd_plus(front, real[non_dominated(real)]),
        "error": float((here - real).mean()),
        "absolute_error": float(np.abs(here - real).mean()),
    }


def _picks(
    rows: Sequence[str], weights: Mapping[str, Sequence[float]], points: Sequence[Mapping[str, Points]]
) -> dict[str, list[tuple[int, float]]]:
    """Which weights every row would pick for the sake of the worst task, and their regret, by seed."""
    equal = [index for index, values in enumerate(weights.values()) if len(set(values)) == 1]
    chosen = {row: [_best(seed[row]) for seed in points] for row in rows}
    chosen |= {EQUAL: equal * len(points)} if equal else {}
    worst = [seed[REAL].min(axis=1) for seed in points]
    return {
        row: [(index, float(real.max() - real[index])) for index, real in zip(indices, worst, strict=True)]
        for row, indices in chosen.items()
    }


def _best(points: Points) -> int:
    found = max_min(points)
    if found is None:
        raise SystemExit("no model has a finite score in every task: nothing can be picked")
    return found


def _picked(weights: Sequence[str], found: Sequence[tuple[int, float]]) -> dict[str, Any]:
    return {"weights": [weights[index] for index, _ in found], "regret": spread([regret for _, regret in found])}


def _row(seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: spread([seed[name] for seed in seeds]) for name in seeds[0]}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The mean over seeds, its interval and the seeds."""
    return {
        "mean": round(mean(values), 4),
        "over_seeds": interval(values),
        "seeds": [round(value, 4) for value in values],
    }


def _volumes(points: Mapping[str, Points], rows: Sequence[str]) -> dict[str, float]:
    return {row: _measures(points, row)["hypervolume"] for row in rows}


def _steps(families: Sequence[str], volumes: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """What every pair of families differs by in hypervolume, paired by seed."""
    return [
        {"first": first, "second": second, **spread([seed[second] - seed[first] for seed in volumes])}
        for place, first in enumerate(families)
        for second in families[place + 1 :]
    ]


def _listed(points: Points) -> list[list[float]]:
    return [[round(float(value), 4) for value in point] for point in points]
