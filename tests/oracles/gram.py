"""The rule with input curvature only, one output at a time: RegMean with a prior (arXiv 2212.09849), in float64.

Row i of W, whose precision is S_t = diag(d_t) + A_t for every i, solves its own system of normal equations:
S w = sum_t alpha_t S_t w_t + (1 - sum_t alpha_t) S_0 w_0.
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
    """Mean and precision for precisions that act entry by entry: every row has its own diagonal matrices."""
    mean, precision = np.empty_like(base_mean), np.empty_like(base_mean)
    for row in range(len(base_mean)):
        mean[row], matrix = merge_row(
            base_mean[row],
            np.diag(base_precision[row]),
            [each[row] for each in means],
            [np.diag(each[row]) for each in precisions],
            weights,
            floor=floor,
        )
        precision[row] = np.diag(matrix)
    return mean, precision


def merge_row(
    base_row: np.ndarray,
    base_matrix: np.ndarray,
    rows: Sequence[np.ndarray],
    matrices: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    floor: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One row of the merge and the matrix of its precision; a floor bounds the diagonal from below."""
    rest = 1 - sum(weights)
    total, moment = rest * base_matrix, rest * base_matrix @ base_row
    for weight, matrix, row in zip(weights, matrices, rows, strict=True):
        total = total + weight * matrix
        moment = moment + weight * matrix @ row
    if floor is None:
        return np.linalg.solve(total, moment), total
    floored = total.copy()
    np.fill_diagonal(floored, np.maximum(np.diag(total), floor))
    # the floor acts as more prior at the base: the pull away from it stays as it was
    return base_row + np.linalg.solve(floored, moment - total @ base_row), floored
