"""The merged density itself (arXiv 2506.14262), in exact fractions.

    log q(x) = log q_0(x) + sum_t alpha_t (log q_t(x) - log q_0(x)) + const

is a parabola for each entry. Three of its values give its curvature, which is the precision, and its slope at
a point, which leads to its top. No natural parameter is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def oracle(
    base_mean: np.ndarray,
    base_precision: np.ndarray,
    means: Sequence[np.ndarray],
    precisions: Sequence[np.ndarray],
    weights: Sequence[float],
    floor: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision in float64; all arrays of shape (entries,).

    A floor replaces the curvature by which the slope at the base is divided.
    """
    mean, precision = [], []
    for entry in range(len(base_mean)):
        top, curvature = _top(
            (base_mean[entry], base_precision[entry]),
            [(m[entry], S[entry]) for m, S in zip(means, precisions, strict=True)],
            weights,
            floor,
        )
        mean.append(float(top))
        precision.append(float(curvature))
    return np.array(mean), np.array(precision)


def _top(
    base: tuple[float, float],
    sources: Sequence[tuple[float, float]],
    weights: Sequence[float],
    floor: float | None,
) -> tuple[Fraction, Fraction]:
    def log_density(x: Fraction) -> Fraction:
        value = _parabola(x, *base)
        for a, source in zip(weights, sources, strict=True):
            value += Fraction(a) * (_parabola(x, *source) - _parabola(x, *base))
        return value

    origin = Fraction(float(base[0]))
    left, middle, right = (log_density(origin + step) for step in (-1, 0, 1))
    slope, curvature = (right - left) / 2, 2 * middle - left - right
    if floor is not None:
        curvature = max(curvature, Fraction(floor))
    return origin + slope / curvature, curvature


def _parabola(x: Fraction, mean: float, precision: float) -> Fraction:
    return -Fraction(float(precision)) * (x - Fraction(float(mean))) ** 2 / 2
