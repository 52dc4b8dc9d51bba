"""From scores of examples to the numbers of the tables: normalised to the experts, with two kinds of intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

Scores: TypeAlias = Mapping[str, Sequence[float]]
Array: TypeAlias = NDArray[numpy.float64]
BASE, EXPERT, LINEAR, JOINT = "base", "experts", "linear", "joint training"
SHORTEST_WAY = 0.1
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
RESAMPLES = 1000


def summary(runs: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Everything that is reported of one family and one way of training.

    Args:
        runs: for every row of the table, scores of examples by task, one entry per seed, in the same order of seeds.
            The rows `base`, `experts`, `linear` and `joint training` must be there.

    Returns:
        For every row: raw and normalised scores by task averaged over seeds; the average over tasks of the normalised
        score with its interval over seeds (Student's) and over test examples (bootstrap, the seeds' models fixed); the
        gain of all tasks together as a share of the experts'; and the share of the way from linear to joint training
        that it goes, where joint training is at least 0.1 better for every seed.
    """
    arrays = {
        row: [{task: numpy.asarray(values, dtype=float) for task, values in seed.items()} for seed in seeds]
        for row, seeds in runs.items()
    }
    tasks = list(arrays[BASE][0])
    with numpy.errstate(divide="ignore", invalid="ignore"):  # of an expert that learnt nothing there is no score
        return _rows(arrays, tasks)


def _rows(arrays: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    draws = _resamples({task: len(arrays[BASE][0][task]) for task in tasks})
    observed = {row: _normalised(arrays, row, _plain) for row in arrays}
    resampled = {
        row: [_per_draw(arrays, row, draws, index) for index in range(len(seeds))] for row, seeds in arrays.items()
    }
    return {row: _row(row, arrays, observed, resampled) for row in arrays}


def _row(
    row: str, arrays: Mapping[str, Any], observed: Mapping[str, Any], resampled: Mapping[str, Any]
) -> dict[str, Any]:
    averages = [float(mean(seed.values())) for seed in observed[row]]
    tasks = list(observed[row][0])
    drawn = numpy.mean(resampled[row], axis=0)
    pooled = [_pooled(arrays, row, index) for index in range(len(averages))]
    return {
        "raw": {task: round(mean(float(seed[task].mean()) for seed in arrays[row]), 4) for task in tasks},
        "normalised": {task: round(float(mean(seed[task] for seed in observed[row])), 4) for task in tasks},
        "average": round(mean(averages), 4),
        "seeds": [round(value, 4) for value in averages],
        "over_seeds": interval(averages),
        "over_examples": _ends(drawn),
        "pooled": round(mean(pooled), 4),
        "pooled_over_seeds": interval(pooled),
        **_way(observed, averages),
    }


def _ends(drawn: Array) -> list[float] | None:
    """The middle 95%; None where some draw has an expert that gains nothing."""
    low, high = (round(float(value), 4) for value in numpy.quantile(drawn, (0.025, 0.975)))
    return None if numpy.isnan(low + high) else [low, high]


def _way(observed: Mapping[str, Any], averages: Sequence[float]) -> dict[str, Any]:
    """The share of the way from linear to joint training; None where that is no way to speak of."""
    low, high = ([float(mean(seed.values())) for seed in observed[each]] for each in (LINEAR, JOINT))
    if min(b - a for a, b in zip(low, high, strict=True)) < SHORTEST_WAY:
        return {"way_to_joint": None, "way_over_seeds": None}
    way = [(here - a) / (b - a) for here, a, b in zip(averages, low, high, strict=True)]
    return {"way_to_joint": round(mean(way), 4), "way_over_seeds": interval(way)}


def _pooled(arrays: Mapping[str, Any], row: str, index: int) -> float:
    """What the tasks gain together, as a share of what the experts gain together."""
    gains = [
        sum(float(values.mean() - arrays[BASE][index][task].mean()) for task, values in arrays[each][index].items())
        for each in (row, EXPERT)
    ]
    return gains[0] / gains[1] if gains[1] else float("nan")


def average_normalised(scores: Scores, base: Scores, experts: Scores) -> float:
    """Score minus the base's, as a share of what the experts gain, averaged over tasks."""
    with numpy.errstate(divide="ignore", invalid="ignore"):  # of an expert that learnt nothing there is no score
        arrays = [{task: numpy.asarray(each[task], dtype=float) for task in scores} for each in (scores, base, experts)]
        found = _normalised_seed({"": arrays[:1], BASE: arrays[1:2], EXPERT: arrays[2:]}, "", 0, _plain)
    return float(numpy.mean(list(found.values())))


def differences(found: Mapping[str, Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Average normalised score of the second row minus that of the first, paired by seed."""
    rows = []
    for first, second in pairs:
        if first in found and second in found:
            each = [b - a for a, b in zip(found[first]["seeds"], found[second]["seeds"], strict=True)]
            rows.append(
                {"first": first, "second": second, "difference": round(mean(each), 4), "over_seeds": interval(each)}
            )
    return rows


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95% interval of a mean; None of a single value."""
    if len(values) < 2:
        return None
    half = STUDENT[len(values)] * float(numpy.std(values, ddof=1)) / len(values) ** 0.5
    return [round(mean(values) - half, 4), round(mean(values) + half, 4)]


def _plain(values: Array, task: str) -> Array:
    return values.mean()  # type: ignore[no-any-return]


def _normalised(arrays: Mapping[str, Any], row: str, average: Callable[[Array, str], Any]) -> list[dict[str, Any]]:
    return [_normalised_seed(arrays, row, index, average) for index in range(len(arrays[row]))]


def _normalised_seed(
    arrays: Mapping[str, Any], row: str, index: int, average: Callable[[Array, str], Any]
) -> dict[str, Any]:
    found = {}
    for task, values in arrays[row][index].items():
        base = average(arrays[BASE][index][task], task)
        expert = average(arrays[EXPERT][index][task], task)
        found[task] = (average(values, task) - base) / (expert - base)
    return found


def _resamples(sizes: Mapping[str, int]) -> dict[str, Array]:
    """How often every resample holds every example, as shares, (resamples, examples), by task."""
    generator = numpy.random.default_rng(0)
    return {task: generator.multinomial(size, [1 / size] * size, RESAMPLES) / size for task, size in sizes.items()}


def _per_draw(arrays: Mapping[str, Any], row: str, draws: Mapping[str, Array], index: int) -> Array:
    by_task = _normalised_seed(arrays, row, index, lambda values, task: draws[task] @ values)
    return numpy.mean(list(by_task.values()), axis=0)  # type: ignore[no-any-return]
