"""S[x] = b for a precision with Kronecker terms, without forming it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.posterior.conjugate_gradients import Solution, conjugate_gradients
from mergekit_bayes.posterior.eigenbasis import Basis, eigenbasis
from mergekit_bayes.posterior.preconditioner import Preconditioner

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior.term import Term

__all__ = ["Solver", "solve", "tightest"]


def tightest(like: Tensor) -> float:
    """The smallest relative residual that is worth asking for in the dtype of a tensor."""
    import torch

    return max(1e-13, 8 * torch.finfo(like.dtype).eps)


class Solver:
    r"""Solves (diag(D) + sum_k G_k (x) A_k)[x] = b by conjugate gradients, for as many b as there are.

    Everything is first turned into the eigenbases of the averaged factors, where S is close to diagonal for tasks that
    resemble each other, and is so exactly for one term and a scalar D, which takes one iteration. See `Preconditioner`.

    Args:
        diagonal: D, 0-dim or (out, in).
        terms: none, or as they come from `combined`.
        outputs: the number of rows of b.
    """

    def __init__(self, diagonal: Tensor, terms: Sequence[Term], outputs: int) -> None:
        self._diagonal = diagonal
        self._basis: Basis | None = None
        if not terms:
            return
        self._basis = eigenbasis(diagonal, terms, outputs)
        self._turned = [self._basis.term(term) for term in terms]
        if diagonal.dim():
            self._turned.append(self._basis.diagonal(diagonal))
            self._diagonal = diagonal.new_zeros(())
        self._preconditioner = Preconditioner(self._diagonal, self._turned)

    def solve(self, b: Tensor, *, tolerance: float, max_iterations: int) -> Solution:
        """Solve for one right-hand side.

        Args:
            b: shape (out, in).
            tolerance: relative residual, in the norm of `conjugate_gradients`.
            max_iterations: largest number of applications of S.

        Raises:
            NonPositivePrecisionError: S is seen not to be positive definite.
            NonFiniteError: NaN or infinity came up.
        """
        if self._basis is None:
            return Solution(b / self._diagonal, 0, 0.0, True)
        solution = conjugate_gradients(
            self._times,
            self._basis.enter(b),
            self._preconditioner.solve,
            tolerance=tolerance,
            max_iterations=max_iterations,
            rounding=self._preconditioner.rounding,
        )
        return solution._replace(x=self._basis.leave(solution.x))

    def _times(self, x: Tensor) -> Tensor:
        product = x * self._diagonal
        for term in self._turned:
            product.add_(term.times(x))
        return product


def solve(diagonal: Tensor, terms: Sequence[Term], b: Tensor, *, tolerance: float, max_iterations: int) -> Solution:
    """Solve one system; see `Solver`, whose arguments and errors these are."""
    solver = Solver(diagonal, terms if b.numel() else (), len(b))
    return solver.solve(b, tolerance=tolerance, max_iterations=max_iterations)
