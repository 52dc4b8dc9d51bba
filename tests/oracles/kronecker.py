"""The rule with full matrices: every Kronecker product written out, every system solved densely, in float64.

m = theta_0 + S^-1 sum_t alpha_t S_t (m_t - theta_0) ,     S = S_0 + sum_t alpha_t (S_t - S_0)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Factors = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""A (or its basis), G (or its basis) or None for the identity, eigenvalues or None."""


def oracle(
    base_mean: np.ndarray,
    base_precision: np.ndarray,
    means: Sequence[np.ndarray],
    precisions: Sequence[np.ndarray],
    weights: Sequence[float],
    floor: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision for precisions that act entry by entry, which are diagonal matrices here."""
    matrices = [full(precision, []) for precision in precisions]
    mean, matrix = merge_dense(base_mean, full(base_precision, []), means, matrices, weights, floor=floor)
    return mean, np.diag(matrix).reshape(base_mean.shape)


def merge_dense(
    base_mean: np.ndarray,
    base_matrix: np.ndarray,
    means: Sequence[np.ndarray],
    matrices: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    floor: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and full precision; a floor bounds the diagonal of S from below (of a diagonal S only, see the library)."""
    total = base_matrix + sum(a * (S - base_matrix) for a, S in zip(weights, matrices, strict=True))
    if floor is not None:
        np.fill_diagonal(total, np.maximum(np.diag(total), floor))
    pull = sum(a * S @ (mean - base_mean).ravel() for a, S, mean in zip(weights, matrices, means, strict=True))
    return base_mean + np.linalg.solve(total, pull).reshape(base_mean.shape), total


def full(diagonal: np.ndarray, terms: Sequence[Factors]) -> np.ndarray:
    """The matrix of a precision for weights read row by row: W[i, j] at i * columns + j."""
    total = np.diag(diagonal.ravel())
    rows = diagonal.shape[0] if diagonal.ndim else 1
    for inner, outer, eigenvalues in terms:
        both = np.kron(np.eye(rows) if outer is None else outer, inner)
        total = total + (both if eigenvalues is None else both @ np.diag(eigenvalues.ravel()) @ both.T)
    return total
