"""Iso-CTS (arXiv 2502.04959) with the projectors of the paper in place of truncated decompositions.

The common left subspace is spanned by eigenvectors of M M^T, a task's by those of its rest R R^T; right singular
vectors follow as R^T u / sigma.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.tsv_m import whitened


def oracle(
    base_mean: np.ndarray,
    base_precision: np.ndarray,
    means: Sequence[np.ndarray],
    precisions: Sequence[np.ndarray],
    weights: Sequence[float],
    floor: float | None = None,
    *,
    scale: float = 1.0,
    common_fraction: float = 0.8,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision in float64 of matrices of full rank."""
    tasks = [weight * (mean - base_mean) for weight, mean in zip(weights, means, strict=True)]
    rank, count = min(base_mean.shape), len(tasks)
    share = min(rank // count, round((rank - int(rank * common_fraction)) / count))
    triples = [_leading(sum(tasks, start=np.zeros_like(base_mean)), rank - share * count)]
    projector = np.eye(len(base_mean)) - triples[0][0] @ triples[0][0].T
    triples += [_leading(projector @ task, share) for task in tasks]
    u, values, v = (np.concatenate([triple[part] for triple in triples], axis=-1) for part in range(3))
    return base_mean + scale * values.mean() * whitened(u) @ whitened(v).T, base_precision


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    squared, vectors = np.linalg.eigh(matrix @ matrix.T)
    values = np.sqrt(squared[::-1][:count])
    left = vectors[:, ::-1][:, :count]
    return left, values, matrix.T @ left / values
