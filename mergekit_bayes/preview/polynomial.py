"""Polynomials of the weights, fitted by least squares: from values at some mixes to values at all of them.

Of degree two they are the surrogates that are fitted to evaluated mixes; of higher degree they carry what is exact at a
few hundred mixes to ten thousand. How far they can be trusted is measured where they were not fitted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.preview.design import Mix

__all__ = ["Polynomial", "fit_polynomial", "polynomial_terms"]

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Polynomial:
    """A polynomial of the weights for every task.

    Attributes:
        degree: total degree.
        free: how many weights it is a polynomial of: on the simplex the last one is known from the others.
        lowest: of the free weights among the fitted mixes.
        highest: likewise.
        coefficients: shape (terms, tasks).
        left_out: for every fitted mix, the error of its prediction from all others, shape (mixes, tasks).
    """

    degree: int
    free: int
    lowest: Array
    highest: Array
    coefficients: Array
    left_out: Array

    def __call__(self, mixes: Sequence[Mix]) -> Array:
        """Values at some mixes, shape (mixes, tasks)."""
        return self._terms(mixes) @ self.coefficients

    @property
    def error(self) -> Array:
        """Root mean square of the errors at mixes that were left out, shape (tasks,)."""
        found: Array = np.sqrt(np.square(self.left_out).mean(axis=0))
        return found

    def _terms(self, mixes: Sequence[Mix]) -> Array:
        return _terms(mixes, self.degree, self.free, self.lowest, self.highest)


def polynomial_terms(free: int, degree: int) -> int:
    """Number of coefficients per task, and so of mixes that are needed at least."""
    return math.comb(free + degree, degree)


def fit_polynomial(mixes: Sequence[Mix], values: Array, *, degree: int) -> Polynomial:
    """Fits values at some mixes by least squares.

    Args:
        mixes: where they are known; not fewer than the polynomial has terms.
        values: shape (mixes, tasks), finite.
        degree: total degree.

    Raises:
        ValueError: there are fewer mixes than terms.
    """
    points = np.asarray(mixes, dtype=np.float64)
    free = free_weights(mixes)
    lowest, highest = points[:, :free].min(axis=0), points[:, :free].max(axis=0)
    terms = _terms(mixes, degree, free, lowest, highest)
    if len(terms) < terms.shape[1]:
        raise ValueError(f"{len(terms)} mixes for a polynomial of {terms.shape[1]} terms")
    directions, sizes, right = np.linalg.svd(terms, full_matrices=False)
    kept = sizes > sizes[0] * len(terms) * np.finfo(np.float64).eps
    directions = directions[:, kept]
    coefficients = (right[kept].T / sizes[kept]) @ (directions.T @ values)
    # leave-one-out errors of least squares from the diagonal of its projection (Allen 1974)
    leverage = np.square(directions).sum(axis=1)
    spare = np.where(leverage < 1 - 1e-9, 1 - leverage, np.nan)
    left_out = (values - terms @ coefficients) / spare[:, None]
    return Polynomial(degree, free, lowest, highest, coefficients, left_out)


def free_weights(mixes: Sequence[Mix]) -> int:
    """How many weights vary on their own: all but one where they always have the same sum."""
    sums = [math.fsum(mix) for mix in mixes]
    return len(mixes[0]) - (1 if max(sums) - min(sums) < 1e-9 else 0)


def _terms(mixes: Sequence[Mix], degree: int, free: int, lowest: Array, highest: Array) -> Array:
    """Products of Chebyshev polynomials, which keep apart what powers make alike, shape (mixes, terms)."""
    points = np.asarray(mixes, dtype=np.float64)[:, :free]
    width = np.where(highest > lowest, highest - lowest, 1.0)
    at = 2 * (points - lowest) / width - 1
    powers = np.polynomial.chebyshev.chebvander(at, degree)
    exponents = [e for e in itertools.product(range(degree + 1), repeat=free) if sum(e) <= degree]
    columns = [np.prod([powers[:, axis, k] for axis, k in enumerate(e)], axis=0) for e in exponents]
    return np.stack(columns, axis=1) if free else np.ones((len(points), 1))
