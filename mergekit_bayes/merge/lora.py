r"""LoRA updates as posteriors: dW = s B A in product space, in factor space, and back to factors.

With independent Gaussian factors of means A, B and variances V_A, V_B,

    E[dW]      = s B A
    Var[dW_ij] = s^2 sum_k (B_ik^2 V_A,kj + A_kj^2 V_B,ik + V_B,ik V_A,kj)
               = s^2 [(B*B + V_B) V_A + V_B (A*A)]_ij

which is exact, the last term included: B is near zero for directions the training did not use, and there it is all
that is left. Shapes throughout: A (rank, in_features), B (out_features, rank), dW (out_features, in_features).

Pure functions of tensors; they know no file and no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROWS_ELEMENTS = 1 << 20
"""Elements of dW that are worked on at a time, beside what has to be whole."""


class Factors(NamedTuple):
    """One LoRA update in memory.

    Attributes:
        a: factor A, shape (rank, in_features).
        b: factor B with the adapter's scaling folded in, shape (out_features, rank).
        variance_a: variance of A, shape of A, or None.
        variance_b: variance of B (scaling folded in: s^2 times the stored one), shape of B, or None.
        prior_variance: the variances that the entries of A and of B would have without any data, where that prior
            is to be taken out of the precision of dW; None to leave it in.
    """

    a: Tensor
    b: Tensor
    variance_a: Tensor | None = None
    variance_b: Tensor | None = None
    prior_variance: tuple[float, float] | None = None


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Cut the rows of a matrix of this shape into blocks of about `ROWS_ELEMENTS` elements, at least a row each."""
    size = max(1, ROWS_ELEMENTS // max(1, shape[1]))
    yield from (slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size))


def product_mean(factors: Factors, rows: slice) -> Tensor:
    """Mean of the given rows of dW, shape (rows, in_features)."""
    return factors.b[rows] @ factors.a


def product_variance(factors: Factors, rows: slice) -> Tensor:
    """Variance of the given rows of dW under independent factors, shape (rows, in_features).

    Raises:
        ValueError: the factors carry no variances.
    """
    if factors.variance_a is None or factors.variance_b is None:
        raise ValueError("these factors carry no variances")
    b, variance_b = factors.b[rows], factors.variance_b[rows]
    return (b * b + variance_b) @ factors.variance_a + variance_b @ (factors.a * factors.a)


def product_precision(factors: Factors, rows: slice) -> Tensor:
    r"""Precision of the given rows of dW: all of it, or what the data added to that of the factors' prior.

        S = 1 / Var[dW]                                        without `prior_variance`
        H = 1 / Var[dW](V_A, V_B) - 1 / Var[dW](V_0A, V_0B)    with it

    H >= 0, because the variance of a product grows with the variances of its factors and data only narrow those. It is
    what takes the place of S_t - S_0t where adapters are merged as dW: their priors belong to the factors, and S_0 to
    dW.

    Returns:
        Shape (rows, in_features).

    Raises:
        ValueError: the factors carry no variances.
    """
    precision = product_variance(factors, rows).reciprocal_()
    if factors.prior_variance is None:
        return precision
    prior_a, prior_b = factors.prior_variance
    b, rank = factors.b[rows], factors.a.shape[0]
    by_row = prior_a * ((b * b).sum(dim=1, keepdim=True) + rank * prior_b)
    by_column = prior_b * (factors.a * factors.a).sum(dim=0)
    return precision.sub_((by_row + by_column).reciprocal_()).clamp_min_(0.0)


def stack(updates: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    r"""The exact weighted sum of updates as one update: sum_t c_t B_t A_t = [c_1 B_1, c_2 B_2, ...] [A_1; A_2; ...].

    Args:
        updates: the updates, any ranks, the same in_features and out_features.
        coefficients: c_t, one per update; negative ones are fine.

    Returns:
        Factors of rank sum of ranks, without variances.
    """
    a = torch.cat([update.a for update in updates], dim=0)
    b = torch.cat([c * update.b for update, c in zip(updates, coefficients, strict=True)], dim=1)
    return Factors(a, b)


def relative_difference(first: Factors, second: Factors) -> float:
    """|B1 A1 - B2 A2|_F / |B2 A2|_F without forming either product; 0 when both vanish.

    For factor-space merging `first` is the merged adapter and `second` the exact weighted sum of the updates: the
    result is the size of the cross terms B_t A_s, s != t, that averaging A and B separately brings in.
    """
    gap = _product_norm(stack([first, second], [1.0, -1.0]))
    size = _product_norm(second)
    if size == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return gap / size


def _product_norm(factors: Factors) -> float:
    r_b = torch.linalg.qr(factors.b.double(), mode="r").R
    r_a = torch.linalg.qr(factors.a.double().T, mode="r").R
    return float(torch.linalg.norm(r_b @ r_a.T))


def fit_factor_variances(
    a: Tensor, b: Tensor, variance: Tensor, *, iterations: int = 10
) -> tuple[tuple[Tensor, Tensor], float]:
    r"""Factor variances whose propagated variance is closest to a given one.

    A merge in product space ends with a variance for every entry of dW, which is as large as the layer; an adapter's
    sidecar has room for the variances of its factors. They are chosen by minimising the generalised Kullback-Leibler
    divergence sum_ij [W log(W / What) - W + What] with What = (B*B + V_B) V_A + V_B (A*A), by the multiplicative
    updates of Lee and Seung (2001) on V_A and V_B in turn; each lowers the divergence and keeps variances positive.

    Args:
        a: factor A, shape (rank, in_features).
        b: factor B, shape (out_features, rank).
        variance: W, the variance of dW, shape (out_features, in_features), > 0.
        iterations: number of sweeps over V_A and V_B; most of the gain is in the first few.

    Returns:
        The variances of A and of B, and the misfit |What - W|_1 / |W|_1.
    """
    squared_a, squared_b = a * a, b * b
    variance_a, variance_b = _first_guess(squared_a, squared_b, float(variance.mean()))
    tiny = float(variance.mean()) * 1e-12
    # An entry may shrink in every sweep; its precision has to stay a number.
    lowest_a, lowest_b = (float(guess.min()) * 1e-9 for guess in (variance_a, variance_b))
    blocks = list(row_blocks(variance.shape))

    def ratio(rows: slice) -> Tensor:
        fitted = product_variance(Factors(a, b, variance_a, variance_b), rows)
        return variance[rows] / fitted.clamp_min_(tiny)

    for _ in range(iterations):
        design = squared_b + variance_b
        pull = sum((design[rows].T @ ratio(rows) for rows in blocks), torch.zeros_like(a))
        variance_a = (variance_a * pull / design.sum(dim=0)[:, None]).clamp_min_(lowest_a)
        design = squared_a + variance_a
        for rows in blocks:
            variance_b[rows] *= (ratio(rows) @ design.T) / design.sum(dim=1)
        variance_b.clamp_min_(lowest_b)
    fitted = Factors(a, b, variance_a, variance_b)
    gap = sum(float((product_variance(fitted, rows) - variance[rows]).abs().sum()) for rows in blocks)
    return (variance_a, variance_b), gap / float(variance.sum())


def _first_guess(squared_a: Tensor, squared_b: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Variances of the right size to start from: each factor brings half, spread evenly over the directions.

    Where a factor is large the other's variance only has to be share / |factor|^2; where both vanish, their
    variances have to make up for it together.
    """
    share = 0.5 * size
    alone = math.sqrt(share * squared_a.shape[0])
    of_a = share / (squared_b.sum(dim=1).mean() + alone)
    of_b = share / (squared_a.sum(dim=0).mean() + alone)
    return of_a.expand_as(squared_a).clone(), of_b.expand_as(squared_b).clone()
