"""Iso-C (arXiv 2502.04959) without a singular value decomposition.

For M = U diag(sigma) V^T of full column rank, U V^T = M (M^T M)^(-1/2), and the singular values are the roots of the
eigenvalues of M^T M.
"""

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
    """Mean and precision in float64 of matrices with at least as many rows as columns and full rank."""
    total = sum(weight * (mean - base_mean) for weight, mean in zip(weights, means, strict=True))
    values, vectors = np.linalg.eigh(total.T @ total)
    flat = total @ (vectors / np.sqrt(values)) @ vectors.T
    return base_mean + scale * np.sqrt(values).mean() * flat, base_precision
