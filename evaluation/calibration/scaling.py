"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599): the cheap way to calibrate, which samples have to beat.

One number, chosen on the same validation data as the temperature of samples, multiplies all log-probabilities.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mergekit_bayes.predict import ClassPrediction


def scaled(prediction: ClassPrediction, factor: float) -> ClassPrediction:
    return replace(prediction, log_probabilities=(factor * prediction.log_probabilities).log_softmax(-1))


def best_factor(validation: ClassPrediction) -> float:
    """The factor with the lowest nll; the nll is convex in it, and so has one minimum in its logarithm."""
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(80):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        losses = [float(scaled(validation, math.exp(each)).nll.mean()) for each in (first, second)]
        low, high = (low, second) if losses[0] <= losses[1] else (first, high)
    return math.exp((low + high) / 2)
