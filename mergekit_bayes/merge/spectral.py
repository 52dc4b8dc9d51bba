r"""What merges of singular values share: weighted task matrices, their spectra, and the nearest isometry.

Methods that reshape a spectrum are written for matrices of full rank, where every singular vector is known. Sums of
LoRA updates are not: the singular vectors of a zero singular value are any basis of what is left, chosen by the
library that computes them. Here directions without a singular value - below the rounding of the largest one - do not
exist, so that a result depends on the matrices alone.

Pure functions of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.posterior import Posterior


class Spectrum(NamedTuple):
    """A singular value decomposition M = U diag(sigma) V^T without the directions M does not have.

    Attributes:
        u: left singular vectors, shape (rows, rank).
        sigma: singular values, descending, > 0, shape (rank,).
        v: right singular vectors, shape (columns, rank).
    """

    u: Tensor
    sigma: Tensor
    v: Tensor

    def top(self, count: int) -> Spectrum:
        """The part with the `count` largest singular values, or all of it where there are fewer."""
        return Spectrum(self.u[:, :count], self.sigma[:count], self.v[:, :count])


def spectrum(matrix: Tensor, size: float = 0.0) -> Spectrum:
    """Decompose a matrix; its rank is numerical, with the bound max(shape) * eps * max(size, largest singular value).

    Args:
        matrix: shape (rows, columns).
        size: of what the matrix was computed from, where that was larger (`size_of`).
    """
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    bound = max(matrix.shape) * torch.finfo(matrix.dtype).eps * sigma[:1].clamp_min(size)
    rank = int((sigma > bound).sum())
    return Spectrum(u[:, :rank], sigma[:rank], vh[:rank].T)


def size_of(matrices: Sequence[Tensor], base: Tensor) -> float:
    """The size at which task matrices, their sums and their differences are rounded, for the bound of `spectrum`.

    That of the matrices is their largest root mean square singular value. Being differences of weights they carry the
    rounding of the base's as well: entries of independent errors eps |theta_0|, whose largest singular value is about
    2 eps |theta_0|_F / sqrt(min(shape)).
    """
    root = math.sqrt(min(base.shape))
    own = max(float(torch.linalg.norm(matrix)) for matrix in matrices)
    return max(own, 4 * float(torch.linalg.norm(base)) / max(base.shape)) / root


def shared_basis(matrices: Sequence[Tensor], size: float) -> Tensor:
    """Left singular vectors of [M_1 .. M_T], shape (rows, rank), by way of the triangular factor of its transpose.

    Args:
        matrices: of the same shape.
        size: see `spectrum`.
    """
    triangle = torch.linalg.qr(torch.cat(list(matrices), dim=1).T, mode="r").R
    return spectrum(triangle.T, size).u


def coordinates(basis: Tensor, matrix: Tensor) -> Tensor:
    """basis^T M with zeros where a column has no part in a direction: what rounding leaves there has a sign, and votes.

    Args:
        basis: orthonormal columns, shape (rows, rank).
        matrix: shape (rows, columns).
    """
    parts = basis.T @ matrix
    noise = 64 * torch.finfo(matrix.dtype).eps * torch.linalg.vector_norm(matrix, dim=0)
    return parts.masked_fill_(parts.abs() <= noise, 0.0)


def joined(parts: Sequence[Spectrum]) -> Spectrum:
    """Several spectra side by side, in the order given; their vectors need not be orthogonal to one another."""
    u, sigma, v = zip(*parts, strict=True)
    return Spectrum(torch.cat(u, dim=1), torch.cat(sigma), torch.cat(v, dim=1))


def isometry(vectors: Tensor) -> Tensor:
    """The nearest (partial) isometry: U V^T of the singular value decomposition, the solution of Procrustes' problem.

    Where the columns depend on one another, the isometry maps what cancels to zero instead of to directions that
    nobody asked for.

    Args:
        vectors: columns, shape (rows, columns).
    """
    parts = spectrum(vectors)
    return parts.u @ parts.v.T


def task_matrices(base: Posterior, sources: Sequence[Posterior], weights: Tensor) -> list[Tensor]:
    """alpha_t (m_t - theta_0) of every source that has one, that is, whose weight and task vector are not zero."""
    weighted = [(source.mean - base.mean) * weights[position] for position, source in enumerate(sources)]
    return [matrix for matrix in weighted if bool(matrix.any())]


def average(base: Posterior, sources: Sequence[Posterior], weights: Tensor, scale: float) -> Tensor:
    """theta_0 + scale / T * sum_t alpha_t (m_t - theta_0) over the T sources with a weight: what is no matrix gets."""
    count = max(1, int((weights != 0).sum()))
    total = torch.zeros_like(base.mean)
    for position, source in enumerate(sources):
        total.add_((source.mean - base.mean).mul_(weights[position]))
    return total.mul_(scale / count).add_(base.mean)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a weight has a spectrum to reshape."""
    return tensor.dim() == 2 and tensor.numel() > 0
