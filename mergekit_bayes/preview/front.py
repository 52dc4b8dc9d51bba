r"""What a set of scores says: which are dominated, how much they dominate, and which one to take.

Here every score is one where more is better, and points are rows of (points, tasks). `oriented` turns losses around and
`normalised` puts tasks on one scale: 0 is the base, 1 the expert of the task.

A point is dominated if another one is at least as good in every task and better in one. Exact hypervolumes, IGD+ and
the non-dominated set come from moocore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "hypervolume",
    "igd_plus",
    "knee",
    "max_min",
    "non_dominated",
    "normalised",
    "oriented",
    "rank_correlation",
    "task_best",
]

Points: TypeAlias = NDArray[np.float64]
"""Scores, shape (points, tasks)."""

Marks: TypeAlias = NDArray[np.bool_]


def oriented(scores: Points, higher_is_better: Sequence[bool]) -> Points:
    """The scores with the sign of those turned where less is better.

    Args:
        scores: shape (points, tasks) or (tasks,).
        higher_is_better: one per task.
    """
    return scores * np.where(list(higher_is_better), 1.0, -1.0)


def normalised(scores: Points, base: Points, expert: Points) -> Points:
    """Each task on the scale of what its expert changed: (score - base) / |expert - base|.

    Where the expert is better than the base, 0 is the base and 1 the expert. Where they score the same there is no
    scale: NaN.

    Args:
        scores: shape (points, tasks), more is better.
        base: shape (tasks,), scores of the base.
        expert: shape (tasks,), the score of each task's own expert in it.
    """
    gain = np.abs(expert - base)
    return (scores - base) / np.where(gain > 0, gain, np.nan)


def non_dominated(points: Points) -> Marks:
    """Which points no other one dominates, shape (points,); equal points are there together, points with NaN never."""
    found: Marks = np.asarray(np.isfinite(points).all(axis=1), dtype=np.bool_)
    if found.any():
        import moocore

        found[found] = moocore.is_nondominated(points[found], maximise=True, keep_weakly=True)
    return found


def hypervolume(points: Points, reference: Points) -> float:
    """Volume of what is dominated by a point and dominates the reference; points with NaN do not count.

    Args:
        points: shape (points, tasks).
        reference: shape (tasks,).
    """
    finite = points[np.isfinite(points).all(axis=1)]
    if not len(finite):
        return 0.0
    import moocore

    return float(moocore.hypervolume(np.ascontiguousarray(finite), ref=reference, maximise=True))


def igd_plus(points: Points, reference_front: Points) -> float:
    r"""Mean over a reference front of the distance by which the nearest point falls short of it.

        IGD+ = mean_r min_a | max(r - a, 0) |_2

    (Ishibuchi et al. 2015). 0 if every reference is reached or surpassed.

    Args:
        points: shape (points, tasks), at least one without NaN.
        reference_front: shape (references, tasks).
    """
    import moocore

    finite = points[np.isfinite(points).all(axis=1)]
    return float(moocore.igd_plus(np.ascontiguousarray(finite), ref=reference_front, maximise=True))


def max_min(points: Points) -> int | None:
    """The point whose worst task is best; of several, the one with the best mean; None without a finite point."""
    return _best(points, points.min(axis=1))


def knee(points: Points) -> int | None:
    """The non-dominated point farthest beyond the plane through the best points of the tasks, in its direction.

    That is where giving up a little in any task gains least (Das 1999). Where those points do not span a plane that
    separates them from the origin, as when one point is best in two tasks, the plane of equal means takes its place.

    Returns:
        Index of the point; None without a finite one.
    """
    marks = non_dominated(points)
    if not marks.any():
        return None
    return _best(points, np.where(marks, points @ _normal(points), -np.inf))


def _normal(points: Points) -> Points:
    tasks = points.shape[1]
    equal = np.full(tasks, 1.0 / tasks)
    corners = points[[best for task in range(tasks) if (best := task_best(points, task)) is not None]]
    try:
        normal: Points = np.asarray(np.linalg.solve(corners, np.ones(tasks)), dtype=np.float64)
    except np.linalg.LinAlgError:
        return equal
    length = float(np.abs(normal).sum())
    found: Points = normal / length if length > 0 else equal
    return found if (found > 1e-9).all() and np.linalg.cond(corners) < 1e9 else equal


def task_best(points: Points, task: int) -> int | None:
    """The point that is best in one task; of several, the one with the best mean; None without a finite point."""
    return _best(points, points[:, task])


def _best(points: Points, values: Points) -> int | None:
    finite = np.isfinite(points).all(axis=1)
    if not finite.any():
        return None
    candidates = np.where(finite, values, -np.inf)
    winners = np.flatnonzero(candidates == candidates.max())
    return int(winners[np.argmax(points[winners].mean(axis=1))])


def rank_correlation(first: Points, second: Points) -> float:
    """Spearman's rank correlation of two vectors, ties with their average rank; NaN where one of them is constant."""
    pair = np.isfinite(first) & np.isfinite(second)
    if pair.sum() < 2:
        return float("nan")
    ranks = [_ranks(values[pair]) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    size = float(np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum()))
    return float(centred[0] @ centred[1]) / size if size else float("nan")


def _ranks(values: Points) -> Points:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Points = (last - (counts - 1) / 2)[inverse]
    return ranks
