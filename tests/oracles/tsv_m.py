"""TSV-M (arXiv 2412.00081) with whitening written as the paper does: X (X^T X)^(-1/2), by eigenvalues."""

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
    *,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision in float64 of matrices whose leading singular vectors are independent across tasks."""
    count = min(base_mean.shape) // len(means)
    left, values, right = [], [], []
    for weight, mean in zip(weights, means, strict=True):
        u, sigma, vh = np.linalg.svd(weight * (mean - base_mean), full_matrices=False)
        left.append(u[:, :count])
        values.append(sigma[:count])
        right.append(vh[:count].T)
    u, v = whitened(np.hstack(left)), whitened(np.hstack(right))
    return base_mean + scale * u @ np.diag(np.concatenate(values)) @ v.T, base_precision


def whitened(columns: np.ndarray) -> np.ndarray:
    """The columns times the inverse square root of their Gram matrix."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    return columns @ (vectors / np.sqrt(values)) @ vectors.T
