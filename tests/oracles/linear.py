"""Model soups (arXiv 2203.05482): a weighted sum of checkpoints, one number at a time."""

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
    """Mean and precision in float64; all arrays of shape (entries,)."""
    mean = [math.fsum(a * m for a, m in zip(weights, column, strict=True)) for column in zip(*means, strict=True)]
    return np.array(mean), base_precision
