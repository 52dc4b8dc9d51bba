"""S[x] = b for a precision with Kronecker terms, without forming it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.errors import NonPositivePrecisionError
from mergekit_bayes.posterior.conjugate_gradients import Solution, conjugate_gradients
from mergekit_bayes.posterior.eigenbasis import eigenbasis
from mergekit_bayes.posterior.term import ROUNDING

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

    Everything is first turned into the eigenbases of the averaged factors, where the diagonal of S is the
    preconditioner: exact for one term and a scalar D (one iteration), and close for tasks that resemble each other.
    Along directions whose curvature drowns in the rounding of the largest, the preconditioner keeps to what rounding
    leaves, so that x stays near zero there instead of amplifying it.

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
    if not terms:
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

    solution = conjugate_gradients(
        times, basis.enter(b), _preconditioner(diagonal, turned), tolerance=tolerance, max_iterations=max_iterations
    )
    return solution._replace(x=basis.leave(solution.x))


def _preconditioner(diagonal: Tensor, turned: Sequence[Term]) -> Tensor:
    import torch

    total = diagonal
    for term in turned:
        total = total + term.diagonal()
    lowest, highest = (float(bound) for bound in total.aminmax())
    if lowest < -16 * ROUNDING * highest or highest <= 0:
        raise NonPositivePrecisionError(
            f"the precision is not positive definite: its curvature along a direction is {lowest:.3g}; "
            "a precision must be positive in every direction"
        )
    # A negative number shows that the factors carry the rounding of float32, whatever dtype they have by now.
    unit = torch.finfo(total.dtype).eps if lowest > 0 else ROUNDING
    return total.clamp(min=16 * unit * highest)
