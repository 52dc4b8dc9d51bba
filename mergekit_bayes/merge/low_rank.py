r"""Low-rank updates that cost the least: adapters in, adapter out.

A merged update W with precision S has to go into factors X = B A of rank r. The loss that its posterior predicts for
that is

    L(X) = 1/2 (X - W)^T S (X - W)

in nats at the scale of S. For a scalar S the truncated singular value decomposition is best (Eckart and Young). It is
also exact for one Kronecker product S = G (x) A and for weights S_ij = u_i v_j, in the coordinates G^1/2 W A^1/2.
Otherwise the problem has no closed form (Srebro and Jaakkola, "Weighted low-rank approximations", ICML 2003) and L is
lowered by turns: with orthonormal rows of A the best B is a linear system, and the other way round; every step of
conjugate gradients on it lowers L, so that stopping early is safe.

Pure functions of posteriors and tensors; shapes as in `mergekit_bayes.merge.lora`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mergekit_bayes.errors import NonPositivePrecisionError
from mergekit_bayes.merge.lora import Factors
from mergekit_bayes.merge.projected import Projected, parts, seen_by_inputs, seen_by_outputs
from mergekit_bayes.merge.truncation import Truncated, truncate_dense, truncate_factors
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.conjugate_gradients import conjugate_gradients

SWEEPS = 8
"""Turns of B and A at most; nine tenths of the gain are in the first three."""

GAIN = 3e-3
"""A turn that lowers the predicted loss by less than this share of it is the last."""

SOLVER_TOLERANCE = 1e-2
SOLVER_ITERATIONS = 10
"""How well a factor is solved for; the next turn changes the system, so that more would be wasted."""


class LowRank(NamedTuple):
    """A low-rank approximation of a posterior's mean, and what it is predicted to cost.

    Attributes:
        a: factor A, shape (rank, in_features), rows scaled by the square roots of the singular values of B A.
        b: factor B, shape (out_features, rank), columns scaled likewise.
        lost_energy: |W - B A|_F^2 / |W|_F^2; 0 for W = 0.
        loss: L of these factors, in nats at the scale of the precision.
        plain_loss: L of the truncated singular value decomposition, at least as large.
    """

    a: Tensor
    b: Tensor
    lost_energy: float
    loss: float
    plain_loss: float


def low_rank(posterior: Posterior, rank: int, generator: Generator) -> LowRank:
    """The mean of a posterior in factors of a given rank, at little predicted loss under its precision.

    Args:
        posterior: mean W, shape (out_features, in_features), and precision S; diagonal or with Kronecker terms.
        rank: largest rank of the result.
        generator: for the randomised decomposition of layers beyond `EXACT_SVD_SIDE`.

    Returns:
        The factors; never worse than the truncated singular value decomposition, and equal to it for a scalar S.
    """
    plain = truncate_dense(posterior.mean, rank, generator)
    before = _loss(posterior, plain.a, plain.b)
    diagonal, terms = parts(posterior)
    nothing_lost = plain.lost_energy <= 8 * torch.finfo(posterior.mean.dtype).eps
    if nothing_lost or before == 0.0 or (not terms and _all_alike(diagonal)):
        return LowRank(plain.a, plain.b, plain.lost_energy, before, before)
    pull = posterior.mean * diagonal
    for term in terms:
        pull = pull + term.times(posterior.mean)
    a, b, gain = _start(posterior, pull, plain, _whitened(posterior, rank, generator))
    a, b = _improved(posterior, pull, a, b, before - gain)
    after = _loss(posterior, a, b)
    if not after < before:
        return LowRank(plain.a, plain.b, plain.lost_energy, before, before)
    kept = truncate_factors(Factors(a, b), rank)
    return LowRank(kept.a, kept.b, _lost_energy(posterior.mean, kept.a, kept.b), after, before)


def _all_alike(values: Tensor) -> bool:
    low, high = values.aminmax()
    return bool(low == high)


def _loss(posterior: Posterior, a: Tensor, b: Tensor) -> float:
    return 0.5 * float(posterior.quadratic(posterior.mean - b @ a))


def _start(
    posterior: Posterior, pull: Tensor, plain: Truncated, whitened: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, float]:
    """The better of two truncations, and by how much L is lower there than at the plain one."""
    if whitened is not None:
        gain = _beyond_constant(posterior, pull, plain.a, plain.b) - _beyond_constant(posterior, pull, *whitened)
        if gain > 0:
            return *whitened, gain
    return plain.a, plain.b, 0.0


def _beyond_constant(posterior: Posterior, pull: Tensor, a: Tensor, b: Tensor) -> float:
    """L without what does not depend on X, 1/2 <X, S[X]> - <X, S[W]>, from the factors: S is not applied to dW."""
    q, r = torch.linalg.qr(a.T)
    b = b @ r.T
    return float((b * (0.5 * seen_by_outputs(posterior, q.T).times(b) - pull @ q)).sum())


def _lost_energy(mean: Tensor, a: Tensor, b: Tensor) -> float:
    lost, whole = ((each.double() ** 2).sum() for each in (mean - b @ a, mean))
    return float(lost / whole) if float(whole) else 0.0


def _whitened(posterior: Posterior, rank: int, generator: Generator) -> tuple[Tensor, Tensor] | None:
    """The truncation under the product of what outputs and inputs see of S on average; None where that is singular."""
    diagonal, terms = parts(posterior)
    mean = posterior.mean
    if not terms:
        rows, columns = diagonal.mean(dim=1).sqrt(), diagonal.mean(dim=0).sqrt()
        kept = truncate_dense(rows[:, None] * mean * columns, rank, generator)
        return kept.a / columns, kept.b / rows[:, None]
    whole = diagonal.expand(mean.shape)
    of_outputs = _root(whole.mean(dim=1), [term.over_inputs(len(mean)) for term in terms])
    of_inputs = _root(whole.mean(dim=0), [term.over_outputs(len(mean)) for term in terms])
    if of_outputs is None or of_inputs is None:
        return None
    kept = truncate_dense(of_outputs.T @ mean @ of_inputs, rank, generator)
    a = torch.linalg.solve_triangular(of_inputs, kept.a, upper=False, left=False)
    return a, torch.linalg.solve_triangular(of_outputs.T, kept.b, upper=True)


def _root(diagonal: Tensor, matrices: list[Tensor]) -> Tensor | None:
    """The lower Cholesky factor of a diagonal plus matrices, or None where rounding has left them singular."""
    total = torch.diag(diagonal)
    for matrix in matrices:
        total = total + matrix
    total.diagonal().add_(total.diagonal().mean() * len(total) * torch.finfo(total.dtype).eps)
    factor, failed = torch.linalg.cholesky_ex(total)
    return None if int(failed) else factor


def _improved(posterior: Posterior, pull: Tensor, a: Tensor, b: Tensor, loss: float) -> tuple[Tensor, Tensor]:
    """Lower L by turns until a turn gains next to nothing of it, or rounding shows a direction of no precision."""
    for _ in range(SWEEPS):
        try:
            a, b, gain_b = _solve_outputs(posterior, pull, a, b)
            a, b, gain_a = _solve_inputs(posterior, pull, a, b)
        except NonPositivePrecisionError:
            break
        loss -= gain_a + gain_b
        if gain_a + gain_b <= GAIN * max(loss, 0.0):
            break
    return a, b


def _solve_outputs(posterior: Posterior, pull: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best B for the row space of A, from where it is; and by how much L went down."""
    q, r = torch.linalg.qr(a.T)
    a, b = q.T, b @ r.T
    step, gain = _step(seen_by_outputs(posterior, a), pull @ a.T, b)
    return a, b + step, gain


def _solve_inputs(posterior: Posterior, pull: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    b, r = torch.linalg.qr(b)
    a = r @ a
    step, gain = _step(seen_by_inputs(posterior, b), b.T @ pull, a)
    return a + step, b, gain


def _step(precision: Projected, pull: Tensor, factor: Tensor) -> tuple[Tensor, float]:
    """S_F^-1 (pull - S_F factor), roughly, and what it gains: <force, step> - 1/2 <step, S_F step>.

    Raises:
        NonPositivePrecisionError: S_F is not positive definite.
    """
    if not bool((precision.diagonal > 0).all()):
        raise NonPositivePrecisionError("a factor of the merged update meets a direction without precision")
    force = pull - precision.times(factor)
    step = conjugate_gradients(
        precision.times,
        force,
        lambda residual: residual / precision.diagonal,
        tolerance=SOLVER_TOLERANCE,
        max_iterations=SOLVER_ITERATIONS,
    ).x
    gain = float((step * force).sum() - 0.5 * (step * precision.times(step)).sum())
    return step, gain
