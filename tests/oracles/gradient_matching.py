"""Uncertainty-based gradient matching (arXiv 2310.12808), with its Hessians as full matrices.

theta = theta_0 + sum_t alpha_t Hbar^-1 (H_0 + H_t) (theta_t - theta_0) ,     Hbar = H_0 + sum_t alpha_t H_t
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
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision in float64; all arrays of shape (entries,)."""
    base_hessian = np.diag(base_precision)
    hessians = [np.diag(precision) - base_hessian for precision in precisions]
    total = base_hessian + sum(a * H for a, H in zip(weights, hessians, strict=True))
    if floor is not None:
        total = np.diag(np.maximum(np.diag(total), floor))
    mean = base_mean.copy()
    for a, H, theta in zip(weights, hessians, means, strict=True):
        mean += a * np.linalg.solve(total, (base_hessian + H) @ (theta - base_mean))
    return mean, np.diag(total)
