"""Task arithmetic (arXiv 2212.04089): stack the task vectors, multiply by the weights, add to the base."""

from __future__ import annotations

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
    task_vectors = np.stack([mean - base_mean for mean in means])
    return base_mean + np.asarray(weights) @ task_vectors, base_precision
