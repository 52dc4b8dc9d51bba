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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

EXACT_SVD_SIDE = 1024
"""Up to this smaller side the singular value decomposition is exact; beyond it a randomised range finder is used."""


class Factors(NamedTuple):
    """One LoRA update in memory.

    Attributes:
        a: factor A, shape (rank, in_features).
        b: factor B with the adapter's scaling folded in, shape (out_features, rank).
        variance_a: variance of A, shape of A, or None.
        variance_b: variance of B (scaling folded in: s^2 times the stored one), shape of B, or None.
    """

    a: Tensor
    b: Tensor
    variance_a: Tensor | None = None
    variance_b: Tensor | None = None


class Truncated(NamedTuple):
    """A low-rank approximation of dW.

    Attributes:
        a: factor A, shape (rank, in_features), rows scaled by the square roots of the singular values.
        b: factor B, shape (out_features, rank), columns scaled likewise.
        lost_energy: 1 - |B A|_F^2 / |dW|_F^2, the share of squared norm that was cut off; 0 for dW = 0.
    """

    a: Tensor
    b: Tensor
    lost_energy: float


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


def truncate_factors(factors: Factors, rank: int) -> Truncated:
    """The best rank-`rank` approximation of B A (Eckart-Young), computed from the factors without forming dW."""
    q_b, r_b = torch.linalg.qr(factors.b)
    q_a, r_a = torch.linalg.qr(factors.a.T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    keep = min(rank, sigma.numel())
    root = sigma[:keep].sqrt()
    a = root[:, None] * (vh[:keep] @ q_a.T)
    b = (q_b @ u[:, :keep]) * root
    return Truncated(a, b, _lost_energy(float(sigma.double().square().sum()), sigma[:keep]))


def truncate_dense(update: Tensor, rank: int, generator: Generator) -> Truncated:
    """A rank-`rank` approximation of a dense dW.

    Exact (Eckart-Young) up to a smaller side of `EXACT_SVD_SIDE`; beyond it a randomised range finder with eight
    extra directions and four power iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4). The lost energy is
    that of the returned factors in both cases, not an estimate.
    """
    if min(update.shape) <= EXACT_SVD_SIDE:
        u, sigma, vh = torch.linalg.svd(update, full_matrices=False)
    else:
        u, sigma, vh = _randomised_svd(update, rank + 8, generator)
    keep = min(rank, sigma.numel())
    root = sigma[:keep].sqrt()
    energy = float(update.double().square().sum())
    return Truncated(root[:, None] * vh[:keep], u[:, :keep] * root, _lost_energy(energy, sigma[:keep]))


def _randomised_svd(matrix: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.randn(matrix.shape[1], min(rank, *matrix.shape), generator=generator, dtype=matrix.dtype)
    q, _ = torch.linalg.qr(matrix @ start.to(matrix.device))
    for _ in range(4):
        p, _ = torch.linalg.qr(matrix.T @ q)
        q, _ = torch.linalg.qr(matrix @ p)
    u, sigma, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, sigma, vh


def _lost_energy(total: float, kept: Tensor) -> float:
    if total == 0.0:
        return 0.0
    return max(0.0, 1.0 - float(kept.double().square().sum()) / total)


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


def fit_factor_variances(a: Tensor, b: Tensor, variance: Tensor, *, iterations: int = 30) -> tuple[Factors, float]:
    r"""Factor variances whose propagated variance is closest to a given one.

    A merge in product space ends with a variance for every entry of dW, which is as large as the layer; an adapter's
    sidecar has room for the variances of its factors. They are chosen by minimising the generalised Kullback-Leibler
    divergence sum_ij [W log(W / What) - W + What] with What = (B*B + V_B) V_A + V_B (A*A), by the multiplicative
    updates of Lee and Seung (2001) on V_A and V_B in turn; each lowers the divergence and keeps variances positive.

    Args:
        a: factor A, shape (rank, in_features).
        b: factor B, shape (out_features, rank).
        variance: W, the variance of dW, shape (out_features, in_features), > 0.
        iterations: number of sweeps over V_A and V_B.

    Returns:
        The factors with their variances, and the misfit |What - W|_1 / |W|_1.
    """
    squared_a, squared_b = a * a, b * b
    size = float(variance.mean())
    tiny = size * 1e-12
    # Half of the mean variance comes from each factor at the start, spread evenly over the directions.
    share = 0.5 * size
    variance_a = (share / squared_b.sum(dim=1).mean().clamp_min(tiny)).expand_as(a).clone()
    variance_b = (share / squared_a.sum(dim=0).mean().clamp_min(tiny)).expand_as(b).clone()
    for _ in range(iterations):
        design = squared_b + variance_b
        ratio = variance / (design @ variance_a + variance_b @ squared_a).clamp_min(tiny)
        variance_a = variance_a * (design.T @ ratio) / design.sum(dim=0)[:, None].clamp_min(tiny)
        design = squared_a + variance_a
        ratio = variance / (variance_b @ design + squared_b @ variance_a).clamp_min(tiny)
        variance_b = variance_b * (ratio @ design.T) / design.sum(dim=1).clamp_min(tiny)
    fitted = Factors(a, b, variance_a, variance_b)
    gap = (product_variance(fitted, slice(None)) - variance).abs().sum()
    return fitted, float(gap / variance.sum())
