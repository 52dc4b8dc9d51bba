"""Bootstrap intervals of all scores and differences of an evaluation; those of as many rows share their resamples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from mergekit_bayes.predict.bootstrap import paired_intervals
from mergekit_bayes.predict.scores import Score
from mergekit_bayes.recipe.evaluate import EvaluateRecipe

__all__ = ["Ends", "Key", "intervals_of"]

Key: TypeAlias = tuple[str, str, str, str]
"""What it is of (`score` or `difference`), title, data set, metric."""

Ends: TypeAlias = Mapping[str, float | None]
"""`low` and `high`; None for a single row, or scores that are not finite."""

_NONE: Ends = {"low": None, "high": None}


def intervals_of(recipe: EvaluateRecipe, pairs: Mapping[Key, tuple[Score, Score]]) -> dict[Key, Ends]:
    """Returns the interval of second minus first for each pair.

    Args:
        recipe: level, resamples and seed.
        pairs: two scores of the same rows.
    """
    by_length: dict[int, dict[Key, tuple[Score, Score]]] = {}
    for key, (first, second) in pairs.items():
        if len(first.parts) > 1 and math.isfinite(first.value) and math.isfinite(second.value):
            by_length.setdefault(len(first.parts), {})[key] = (first, second)
    wanted, found = recipe.intervals, dict.fromkeys(pairs, _NONE)
    for own in by_length.values():
        intervals = paired_intervals(own, level=wanted.level, resamples=wanted.resamples, seed=recipe.seed)
        found |= {key: {"low": each.low, "high": each.high} for key, each in intervals.items()}
    return found
