"""Random layers with every kind of Kronecker term, and the same in full matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Posterior, Term
from mergekit_bayes.posterior.kronecker import as_kronecker
from tests.oracles.kronecker import full

ROWS, COLUMNS = 4, 6
KINDS = ("plain", "gram", "corrected")


class Draw:
    """Posteriors from one seed; `prior` is their scalar diagonal."""

    def __init__(
        self, seed: int, *, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (ROWS, COLUMNS)
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.shape = dtype, shape

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def definite(self, size: int) -> Tensor:
        """A covariance with eigenvalues from about 0.05 to 3."""
        root = self.normal(2 * size, size)
        return root.mT @ root / len(root)

    def term(self, kind: str) -> Term:
        rows, columns = self.shape
        if kind == "plain":
            return Term(self.definite(columns), 5 * self.definite(rows))
        if kind == "gram":
            return Term(5 * self.definite(columns), None)
        inner, outer = (torch.linalg.qr(self.normal(size, size)).Q for size in (columns, rows))
        return Term(inner, outer, self.normal(rows, columns).square() * 4)

    def posterior(self, *kinds: str, prior: float | Tensor = 0.3) -> Kronecker:
        mean = self.normal(*self.shape)
        diagonal = prior if isinstance(prior, Tensor) else mean.new_tensor(prior)
        return Kronecker(mean, diagonal, [self.term(kind) for kind in kinds])

    def beyond(self, base: Posterior, kind: str) -> Kronecker:
        """A task posterior that has learned something everywhere: the precision of the base and a term more."""
        known = as_kronecker(base)
        return Kronecker(self.normal(*self.shape), known.diagonal, [*known.terms, self.term(kind)])

    def prior(self, precision: float = 0.3) -> Isotropic:
        return Isotropic(self.normal(*self.shape), precision)

    def diagonal(self) -> Diagonal:
        return Diagonal(self.normal(*self.shape), 0.3 + self.normal(*self.shape).square())


def matrix(posterior: Posterior) -> np.ndarray:
    """The full precision in float64, by the oracle."""
    entries = posterior.diagonal if isinstance(posterior, Kronecker) else posterior.precision_tensor()
    terms = posterior.terms if isinstance(posterior, Kronecker) else ()
    factors = [tuple(None if part is None else numbers(part) for part in term) for term in terms]
    return full(numbers(entries.expand_as(posterior.mean)), factors)


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()
