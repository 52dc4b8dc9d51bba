r"""Conjugate gradients for S[x] = b with S symmetric and positive definite, known only by what it does to a tensor.

Preconditioned by a positive number per entry, M ~ diag(S) (Hestenes and Stiefel, 1952; Saad, "Iterative methods for
sparse linear systems", algorithm 9.1). The residual is measured in the norm of M^-1, which is about the error in the
norm of S: half the square of that error is what the quadratic 1/2 x^T S x - b^T x still lies above its minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.errors import NonFiniteError, NonPositivePrecisionError
from mergekit_bayes.posterior.term import ROUNDING

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
    preconditioner: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Solve S[x] = b from x = 0.

    The residual of the recursion drifts away from the true one by rounding, so the true one is computed where the
    recursion says that it is done, and the solver starts again from there as long as that helps.

    Args:
        times: x -> S[x].
        b: the right-hand side, of any shape.
        preconditioner: M, positive, broadcasts against b.
        tolerance: relative residual to stop at.
        max_iterations: largest number of applications of S.

    Returns:
        The solution, converged or not: every iteration lowers the error in the norm of S.

    Raises:
        NonPositivePrecisionError: a direction p was met along which p^T S p is negative beyond rounding.
        NonFiniteError: NaN or infinity came up.
    """
    x, residual = b.new_zeros(b.shape), b
    size = _norm(b, preconditioner)
    if size == 0.0:
        return Solution(x, 0, 0.0, True)
    iterations, reached = 0, 1.0
    for _ in range(REFINEMENTS):
        step, used = _descend(
            times, residual, preconditioner, goal=tolerance * size, max_iterations=max_iterations - iterations
        )
        iterations += used
        candidate = x + step
        remaining = b - times(candidate)
        relative = _norm(remaining, preconditioner) / size
        if relative >= reached:
            break
        stalled = relative > reached / 2
        x, residual, reached = candidate, remaining, relative
        if reached <= tolerance or stalled or iterations >= max_iterations:
            break
    return Solution(x, iterations, reached, reached <= tolerance)


def _descend(
    times: Callable[[Tensor], Tensor], b: Tensor, preconditioner: Tensor, *, goal: float, max_iterations: int
) -> tuple[Tensor, int]:
    """One run of the recursion, until its residual is at most `goal`; x and the number of iterations."""
    x, residual = b.new_zeros(b.shape), b.clone()
    direction = residual / preconditioner
    square = _square(residual, direction)
    for iteration in range(1, max_iterations + 1):
        image = times(direction)
        curvature = _square(direction, image)
        if not curvature > 0:
            if curvature >= -_rounding(preconditioner) * _square(direction, direction):
                return x, iteration  # only directions are left in which S drowns in its own rounding
            _refuse(curvature, iteration)
        length = square / curvature
        x.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        scaled = residual / preconditioner
        previous, square = square, _square(residual, scaled)
        if square <= goal * goal:
            return x, iteration
        direction.mul_(square / previous).add_(scaled)
    return x, max_iterations


def _rounding(preconditioner: Tensor) -> float:
    """The curvature along a unit vector that rounding can fake."""
    return 16 * ROUNDING * float(preconditioner.amax())


def _refuse(curvature: float, iteration: int) -> None:
    if math.isnan(curvature):
        raise NonFiniteError(f"conjugate gradients: NaN or infinity in iteration {iteration}; is every input finite?")
    raise NonPositivePrecisionError(
        f"the precision is not positive definite: its curvature along a direction is {curvature:.3g} (seen in "
        f"iteration {iteration} of the solver); a precision must be positive in every direction"
    )


def _norm(values: Tensor, preconditioner: Tensor) -> float:
    return math.sqrt(_square(values, values / preconditioner))


def _square(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum())
