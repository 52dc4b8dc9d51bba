r"""The rule for precisions with Kronecker terms.

    S = S_0 + sum_t alpha_t (S_t - S_0)
    S[m - o] = sum_t alpha_t S_t[m_t - o] + (1 - sum_t alpha_t) S_0[theta_0 - o]

for any point o; with o = theta_0 it is the formula of `mergekit_bayes.posterior.rule`. Here o is the plain sum of task
vectors, o = theta_0 + sum_t alpha_t (m_t - theta_0), so that what is solved for is the correction to task arithmetic,
and weights that sum to one leave no trace of the base. Solving S[x] = b for matching curvature-weighted gradients is
the view of Tam, Bansal and Raffel (arXiv 2312.04339).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.errors import NonPositivePrecisionError
from mergekit_bayes.posterior.conjugate_gradients import Solution
from mergekit_bayes.posterior.kronecker import Kronecker, as_kronecker
from mergekit_bayes.posterior.rule import check_inputs
from mergekit_bayes.posterior.solve import solve
from mergekit_bayes.posterior.term import ROUNDING, Term, combined

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior.family import Posterior

__all__ = ["merge_kronecker"]

Share = tuple[float, Kronecker]


def merge_kronecker(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> tuple[Kronecker, Solution]:
    r"""Merge posteriors of one linear layer by the rule, and say how well its system was solved.

    Where all terms are I (x) A and the diagonal is one number, (d I + A) is factorised, in float64; otherwise conjugate
    gradients run in the dtype of the means.

    Args:
        base: theta_0 and S_0, shape (out, in), of this family or a poorer one.
        sources: the task posteriors q_t, likewise.
        weights: alpha_t, shape (sources,); negative ones remove a task.
        floor: lower bound for the diagonal part of S, applied before solving; None for none. Kronecker terms that
            negative weights turn negative can still outweigh it.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: largest number of their iterations; a solution short of the tolerance is no error, because
            every iteration improves on task arithmetic.

    Returns:
        The merged posterior, whose values are finite and whose S was not seen to lack positivity, and the solution.

    Raises:
        MethodError, ShapeMismatchError: as `merge_posteriors`.
        NonPositivePrecisionError: S is seen not to be positive definite.
    """
    check_inputs(sources, weights, base=base)
    rest = 1 - weights.sum()
    # What has no share is not touched: with weights that sum to one this is the base.
    shares = [
        (float(share), as_kronecker(posterior))
        for share, posterior in zip((rest, *weights), (base, *sources), strict=True)
        if float(share) != 0.0
    ]
    diagonal, terms = _precision(shares)
    if floor is not None:
        diagonal = diagonal.clamp(min=floor)
    origin = _task_arithmetic(shares, base.mean)
    closed = diagonal.dim() == 0 and all(term.output is None and term.eigenvalues is None for term in terms)
    if closed and terms:
        solution = _solve_inputs(diagonal, terms, _force(shares, origin.double()))
    else:
        solution = solve(diagonal, terms, _force(shares, origin), tolerance=tolerance, max_iterations=max_iterations)
    mean = origin + solution.x.to(origin.dtype)
    return Kronecker.unchecked(mean, diagonal, terms), solution


def _precision(shares: Sequence[Share]) -> tuple[Tensor, tuple[Term, ...]]:
    diagonals = [posterior.diagonal * share for share, posterior in shares]
    total = diagonals[0]
    for diagonal in diagonals[1:]:
        total = total + diagonal
    return total, combined(term.scaled(share) for share, posterior in shares for term in posterior.terms)


def _task_arithmetic(shares: Sequence[Share], base: Tensor) -> Tensor:
    anchor = shares[0][1].mean  # the base, or the first source where the base has no share
    total = anchor.clone()
    for share, posterior in shares:
        total.add_((posterior.mean - anchor).mul_(share))
    return total


def _force(shares: Sequence[Share], origin: Tensor) -> Tensor:
    """The sum of alpha_t S_t[m_t - o], in the dtype of the origin."""
    total = origin.new_zeros(origin.shape)
    for share, posterior in shares:
        cast = posterior.to(origin.dtype)
        total.add_(cast.precision_times(cast.mean - origin), alpha=share)
    return total


def _solve_inputs(diagonal: Tensor, terms: Sequence[Term], force: Tensor) -> Solution:
    """Solve x (d I + A) = b by a Cholesky factorisation in the dtype of b.

    Rounding can leave an A of few examples with eigenvalues below -d; it then gets as much as rounding may be.
    """
    import torch

    (term,) = terms
    matrix = term.input.to(force.dtype, copy=True)
    matrix.diagonal().add_(diagonal)
    factor, fault = torch.linalg.cholesky_ex(matrix)
    if int(fault):
        matrix.diagonal().add_(len(matrix) * ROUNDING * matrix.diagonal().amax().clamp(min=0))
        factor, fault = torch.linalg.cholesky_ex(matrix)
    if int(fault):
        raise NonPositivePrecisionError(
            f"the precision of {len(matrix)} inputs is not positive definite, seen at input {int(fault)}; "
            "make negative weights smaller, or prior precision or shrinkage larger"
        )
    return Solution(torch.cholesky_solve(force.mT, factor).mT, 0, 0.0, True)
