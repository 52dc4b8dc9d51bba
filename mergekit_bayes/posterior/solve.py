"""S[x] = b for a precision with Kronecker terms, without forming it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.posterior.conjugate_gradients import Solution, conjugate_gradients
from mergekit_bayes.posterior.eigenbasis import eigenbasis
from mergekit_bayes.posterior.preconditioner import Preconditioner

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior.term import Term

__all__ = ["solve", "tightest"]


def tightest(like: Tensor) -> float:
    """The smallest relative residual that is worth asking for in the dtype of a tensor."""
    import torch

    return max(1e-13, 8 * torch.finfo(like.dtype).eps)


def solve(diagonal: Tensor, terms: Sequence[Term], b: Tensor, *, tolerance: float, max_iterations: int) -> Solution:
    r"""Solve (diag(D) + sum_k G_k (x) A_k)[x] = b by conjugate gradients.

    Everything is first turned into the eigenbases of the averaged factors, where S is close to diagonal for tasks that
    resemble each other, and is so exactly for one term and a scalar D, which takes one iteration. See `Preconditioner`.

    Args:
        diagonal: D, 0-dim or (out, in).
        terms: none, or as they come from `combined`.
        b: shape (out, in).
        tolerance: relative residual, in the norm of `conjugate_gradients`.
        max_iterations: largest number of applications of S.

    Raises:
        NonPositivePrecisionError: S is seen not to be positive definite.
        NonFiniteError: NaN or infinity came up.
    """
    if not terms or b.numel() == 0:
        return Solution(b / diagonal, 0, 0.0, True)
    basis = eigenbasis(diagonal, terms, len(b))
    turned = [basis.term(term) for term in terms]
    if diagonal.dim():
        turned.append(basis.diagonal(diagonal))
        diagonal = diagonal.new_zeros(())

    def times(x: Tensor) -> Tensor:
        product = x * diagonal
        for term in turned:
            product.add_(term.times(x))
        return product

    preconditioner = Preconditioner(diagonal, turned)
    solution = conjugate_gradients(
        times,
        basis.enter(b),
        preconditioner.solve,
        tolerance=tolerance,
        max_iterations=max_iterations,
        rounding=preconditioner.rounding,
    )
    return solution._replace(x=basis.leave(solution.x))
