"""Scores over seeds, and which differences are told from chance: by the choice of test examples, and by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from mergekit_bayes.predict import ClassPrediction, Score, TokenPrediction, paired_interval

REFERENCE = "AdamW, mean"
PAIRS = (
    (REFERENCE, "IVON, mean"),
    (REFERENCE, "IVON, samples, chosen"),
    ("IVON, mean", "IVON, samples, chosen"),
    ("AdamW, mean, scaled", "IVON, samples, chosen"),
    ("AdamW, mean, scaled", "IVON, mean, scaled"),
    (REFERENCE, "AdamW, samples, fisher"),
    (REFERENCE, "AdamW, samples, kfac"),
    ("AdamW, samples, fisher", "AdamW, samples, kfac"),
    ("AdamW, mean, scaled", "AdamW, samples, kfac"),
)


def compare(scores: Mapping[str, Sequence[Mapping[str, Score]]], *, groups: Tensor | None) -> dict[str, Any]:
    """Means over seeds by variant, and differences with two intervals.

    `examples` is the bootstrap interval over test examples (rows, for tokens) of the score averaged over seeds; it
    holds for these training runs. `seeds` is Student's interval of the differences between runs with the same seed; it
    holds for this test set, and with three seeds it is wide.
    """
    variants = {
        name: {score: _summary([run[score].value for run in runs]) for score in runs[0]}
        for name, runs in scores.items()
    }
    differences = [
        _difference(pair, score, scores, groups)
        for pair in PAIRS
        if pair[0] in scores and pair[1] in scores
        for score in scores[pair[0]][0]
    ]
    return {"variants": variants, "differences": differences}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"values": list(values), "mean": statistics.fmean(values)}


def _difference(
    pair: tuple[str, str], score: str, scores: Mapping[str, Sequence[Mapping[str, Score]]], groups: Tensor | None
) -> dict[str, Any]:
    first, second = ([run[score] for run in scores[name]] for name in pair)
    found = paired_interval(first, second, groups=groups)
    by_seed = [late.value - early.value for early, late in zip(first, second, strict=True)]
    return {
        "first": pair[0],
        "second": pair[1],
        "score": score,
        "higher_is_better": first[0].higher_is_better,
        "difference": found.difference,
        "examples": [found.low, found.high],
        "seeds": _student(by_seed),
    }


def _student(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    if len(values) < 2:
        return None
    centre, spread = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * spread
    return [centre - half, centre + half]


def reliability(predictions: Sequence[ClassPrediction | TokenPrediction], bins: int) -> list[list[float]] | None:
    """Share, mean confidence and accuracy of every bin that is not empty, over all seeds together."""
    parts = [
        prediction if isinstance(prediction, ClassPrediction) else prediction.vocabulary for prediction in predictions
    ]
    if any(part is None for part in parts):
        return None
    confidence = torch.cat([part.confidence for part in parts])  # type: ignore[union-attr]
    correct = torch.cat([part.correct for part in parts]).double()  # type: ignore[union-attr]
    places = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    rows = []
    for place in range(bins):
        inside = places == place
        if inside.any():
            means = (inside.double().mean(), confidence[inside].mean(), correct[inside].mean())
            rows.append([float(mean) for mean in means])
    return rows
