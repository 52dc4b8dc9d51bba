"""Fisher averaging (arXiv 2111.09832): for each entry where sum_t a_t S_t (x - m_t)^2 / 2 is stationary."""

from __future__ import annotations

import math
from collections.abc import Sequence

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

    Below a floor there is too little precision for an average; what is missing is put on the plain average of
    the sources, as if it were one more of them.
    """
    mean, precision = np.empty_like(base_mean), np.empty_like(base_mean)
    for entry in range(len(base_mean)):
        scales = [a * S[entry] for a, S in zip(weights, precisions, strict=True)]
        values = [m[entry] for m in means]
        total = math.fsum(scales)
        if floor is None or total >= floor:
            mean[entry] = math.fsum(s * v for s, v in zip(scales, values, strict=True)) / total
            precision[entry] = total
        else:
            missing, middle = floor - total, math.fsum(values) / len(values)
            pulls = [s * v for s, v in zip(scales, values, strict=True)]
            mean[entry] = math.fsum([*pulls, missing * middle]) / floor
            precision[entry] = floor
    return mean, precision
