r"""Conjugate gradients for S[x] = b with S symmetric and positive definite, known only by what it does to a tensor.

Preconditioned by some M ~ S that is easy to invert (Hestenes and Stiefel, 1952; Saad, "Iterative methods for sparse
linear systems", algorithm 9.1). The residual is measured in the norm of M^-1, which is about the error in the
norm of S: half the square of that error is what the quadratic 1/2 x^T S x - b^T x still lies above its minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.errors import NonFiniteError, NonPositivePrecisionError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Solution", "conjugate_gradients"]

REFINEMENTS = 3


class Solution(NamedTuple):
    """What the solver reached.

    Attributes:
        x: the solution, of the shape of b.
        iterations: how often S was applied on the way.
        residual: |b - S[x]| / |b| in the norm of M^-1, computed from x and not from the recursion.
        converged: whether the residual is within the tolerance.
    """

    x: Tensor
    iterations: int
    residual: float
    converged: bool


def conjugate_gradients(
    times: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_iterations: int,
    rounding: float = 0.0,
) -> Solution:
    """Solve S[x] = b from x = 0.

    The residual of the recursion drifts away from the true one by rounding, so the true one is computed where the
    recursion says that it is done, and the solver starts again from there as long as that helps.

    Args:
        times: x -> S[x].
        b: the right-hand side, of any shape.
        precondition: r -> M^-1[r], symmetric and positive definite, as a new tensor.
        tolerance: relative residual to stop at.
        max_iterations: largest number of applications of S.
        rounding: the curvature along a unit vector that rounding can fake; a negative one of this size ends the
            descent.

    Returns:
        The solution, converged or not: every iteration lowers the error in the norm of S.

    Raises:
        NonPositivePrecisionError: a direction p was met along which p^T S p is negative beyond rounding.
        NonFiniteError: NaN or infinity came up.
    """
    x, residual = b.new_zeros(b.shape), b
    size = _norm(b, precondition)
    if size == 0.0:
        return Solution(x, 0, 0.0, True)
    iterations, reached = 0, 1.0
    for _ in range(REFINEMENTS):
        step, used = _descend(
            times,
            residual,
            precondition,
            goal=tolerance * size,
            max_iterations=max_iterations - iterations,
            rounding=rounding,
        )
        iterations += used
        candidate = x + step
        remaining = b - times(candidate)
        relative = _norm(remaining, precondition) / size
        if relative >= reached:
            break
        stalled = relative > reached / 2
        x, residual, reached = candidate, remaining, relative
        if reached <= tolerance or stalled or iterations >= max_iterations:
            break
    return Solution(x, iterations, reached, reached <= tolerance)


def _descend(
    times: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    goal: float,
    max_iterations: int,
    rounding: float,
) -> tuple[Tensor, int]:
    """One run of the recursion, until its residual is at most `goal`; x and the number of iterations."""
    x, residual = b.new_zeros(b.shape), b.clone()
    direction = precondition(residual)
    square = _square(residual, direction)
    for iteration in range(1, max_iterations + 1):
        image = times(direction)
        curvature = _square(direction, image)
        if not curvature > 0:
            if curvature >= -rounding * _square(direction, direction):
                return x, iteration  # only directions are left in which S drowns in its own rounding
            _refuse(curvature, iteration)
        length = square / curvature
        x.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        scaled = precondition(residual)
        previous, square = square, _square(residual, scaled)
        if square <= goal * goal:
            return x, iteration
        direction.mul_(square / previous).add_(scaled)
    return x, max_iterations


def _refuse(curvature: float, iteration: int) -> None:
    if math.isnan(curvature):
        raise NonFiniteError(f"conjugate gradients: NaN or infinity in iteration {iteration}; is every input finite?")
    raise NonPositivePrecisionError(
        f"the precision is not positive definite: its curvature along a direction is {curvature:.3g} (seen in "
        f"iteration {iteration} of the solver); a precision must be positive in every direction"
    )


def _norm(values: Tensor, precondition: Callable[[Tensor], Tensor]) -> float:
    return math.sqrt(_square(values, precondition(values)))


def _square(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum())
