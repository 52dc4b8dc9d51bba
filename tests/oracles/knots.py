"""KnOTS-TIES (arXiv 2410.19735): TIES on U^T M_t, the coordinates of a task in the joint left singular vectors.

diag(sigma) V_t^T = U^T M_t, so that the right singular vectors are never written down; U comes from the eigenvectors
of sum_t M_t M_t^T.
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
    density: Sequence[float] | None = None,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision in float64 of matrices."""
    tasks = [weight * (mean - base_mean) for weight, mean in zip(weights, means, strict=True)]
    _, basis = np.linalg.eigh(sum(task @ task.T for task in tasks))
    joint = min(base_mean.shape[0], base_mean.shape[1] * len(tasks))
    basis = basis[:, -joint:]
    shares = [0.2] * len(tasks) if density is None else density
    votes = np.stack([_trimmed(basis.T @ task, share) for task, share in zip(tasks, shares, strict=True)])
    elected = np.zeros(votes.shape[1:])
    for index in np.ndindex(*elected.shape):
        ballots = votes[(slice(None), *index)]
        winners = ballots[np.sign(ballots) == np.sign(ballots.sum())]
        elected[index] = winners.mean() if ballots.sum() != 0 else 0.0
    return base_mean + scale * basis @ elected, base_precision


def _trimmed(values: np.ndarray, share: float) -> np.ndarray:
    count = values.size if share >= 1 else max(1, int(share * values.size)) if share > 0 else 0
    smallest = np.sort(np.abs(values).ravel())[::-1][count - 1] if count else np.inf
    return np.where(np.abs(values) >= smallest, values, 0.0)
