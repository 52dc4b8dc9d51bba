r"""Low-rank approximations of updates in the Frobenius norm: the truncated singular value decomposition.

Shapes as in `mergekit_bayes.merge.lora`. Pure functions of tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mergekit_bayes.merge.lora import Factors, row_blocks

EXACT_SVD_SIDE = 1024
"""Up to this smaller side the singular value decomposition is exact; beyond it a randomised range finder is used."""


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


def truncate_factors(factors: Factors, rank: int) -> Truncated:
    """The best rank-`rank` approximation of B A (Eckart-Young), computed from the factors without forming dW."""
    q_b, r_b = torch.linalg.qr(factors.b)
    q_a, r_a = torch.linalg.qr(factors.a.T)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    keep = min(rank, sigma.numel())
    root = sigma[:keep].sqrt()
    a = root[:, None] * (vh[:keep] @ q_a.T)
    b = (q_b @ u[:, :keep]) * root
    return Truncated(a, b, _lost_energy(_energy(sigma), sigma[:keep]))


def truncate_dense(update: Tensor, rank: int, generator: Generator) -> Truncated:
    """A rank-`rank` approximation of a dense dW.

    Exact (Eckart-Young) up to a smaller side of `EXACT_SVD_SIDE`; beyond it a randomised range finder with eight
    extra directions and four power iterations (Halko, Martinsson and Tropp 2011, algorithm 4.4). The lost energy is
    that of the returned factors in both cases, not an estimate.
    """
    if min(update.shape) <= EXACT_SVD_SIDE:
        u, sigma, vh = torch.linalg.svd(update, full_matrices=False)
        energy = _energy(sigma)
    else:
        u, sigma, vh = _randomised_svd(update, rank + 8, generator)
        energy = sum(_energy(update[rows]) for rows in row_blocks(update.shape))
    keep = min(rank, sigma.numel())
    root = sigma[:keep].sqrt()
    return Truncated(root[:, None] * vh[:keep], u[:, :keep] * root, _lost_energy(energy, sigma[:keep]))


def _randomised_svd(matrix: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.randn(matrix.shape[1], min(rank, *matrix.shape), generator=generator, dtype=matrix.dtype)
    q, _ = torch.linalg.qr(matrix @ start.to(matrix.device))
    for _ in range(4):
        p, _ = torch.linalg.qr(matrix.T @ q)
        q, _ = torch.linalg.qr(matrix @ p)
    u, sigma, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, sigma, vh


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


def _lost_energy(total: float, kept: Tensor) -> float:
    return 0.0 if total == 0.0 else max(0.0, 1.0 - _energy(kept) / total)
