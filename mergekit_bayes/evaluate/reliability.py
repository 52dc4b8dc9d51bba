"""How often a classifier is right when it says how sure it is: the numbers of a reliability diagram."""

from __future__ import annotations

import torch

from mergekit_bayes.predict.classes import ClassPrediction
from mergekit_bayes.predict.scores import BINS

__all__ = ["reliability"]


def reliability(prediction: ClassPrediction, *, bins: int = BINS) -> list[dict[str, float]]:
    """Confidence and accuracy in bins of equal width, those of `calibration_gaps`; empty bins are left out.

    (DeGroot and Fienberg 1983; Guo et al. 2017, arXiv 1706.04599.) Their distances, weighted by `rows`, are the
    expected calibration error.

    Args:
        prediction: with labels.
        bins: how many.

    Returns:
        For each bin its `low` and `high` end, its `rows`, their mean `confidence` and their `accuracy`.
    """
    sure, right = prediction.confidence, prediction.correct.double()
    places = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    counts = torch.bincount(places, minlength=bins)
    sums = [torch.bincount(places, weights=values, minlength=bins) for values in (sure, right)]
    return [
        {
            "low": bin_ / bins,
            "high": (bin_ + 1) / bins,
            "rows": int(counts[bin_]),
            "confidence": float(sums[0][bin_] / counts[bin_]),
            "accuracy": float(sums[1][bin_] / counts[bin_]),
        }
        for bin_ in range(bins)
        if counts[bin_]
    ]
