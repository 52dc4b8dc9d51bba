r"""The rule with input and output curvature of every linear layer: S_t = S_0 + G_t (x) A_t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import Kronecker, merge_kronecker, merge_posteriors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "kronecker",
    base="required",
    precision="required",
    prior="required",
    paper="arXiv 2312.04339",
    parameters=(
        Parameter(
            "shrinkage",
            float,
            0.1,
            minimum=0.0,
            maximum=1.0,
            help="how far off-diagonal entries of the factors are drawn to zero",
        ),
        Parameter("tolerance", float, 1e-4, minimum=0.0, help="relative residual at which the solver stops"),
        Parameter("max_iterations", int, 200, minimum=1, help="largest number of iterations of the solver"),
    ),
    scope="tensor",
    entrywise=True,
    families=("isotropic", "diagonal", "kronecker"),
)
def kronecker(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    shrinkage: float = 0.1,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> Merge:
    r"""Posterior merging with input and output curvature per linear layer.

        S = S_0 + sum_t alpha_t (S_t - S_0) ,     S_t = S_0 + G_t (x) A_t
        m = theta_0 + S^-1 sum_t alpha_t S_t (m_t - theta_0)

    with A_t the second moment of a layer's inputs and G_t that of the gradients at its outputs; solved by conjugate
    gradients, as in Tam, Bansal and Raffel, "Merging by matching models in task parameter subspaces" (arXiv
    2312.04339), but with the prior counted once. Tensors whose posteriors act entry by entry are merged as by
    `gradient_matching`.

    Factors estimated from a few hundred examples overstate how different directions are. Shrinkage multiplies their
    off-diagonal entries by 1 - shrinkage, which leaves the diagonal of S alone; the default is the 0.9 that RegMean
    (arXiv 2212.09849) found to work for its input factors. 0 takes the factors as they are, 1 leaves a diagonal.

    The tolerance is relative to the residual of task arithmetic and in a norm close to that of S: at the default, what
    the posteriors predict for the loss is within about 1e-7 of what the solution gains over task arithmetic, and the
    weights are within about 1e-3 of the correction, which is less than bfloat16 can tell.

    Args:
        base: mean theta_0 and prior precision S_0, shape (*weight).
        sources: the task posteriors, S_t including the prior.
        weights: alpha_t, shape (sources,); negative ones remove a task.
        floor: lower bound for the diagonal part of S, which negative weights can make negative.
        shrinkage: between 0 and 1.
        tolerance: relative residual at which conjugate gradients stop.
        max_iterations: largest number of their iterations.

    Returns:
        The merge; for tensors with factors, measures `iterations` and `residual` of the solver.
    """
    if not any(isinstance(each, Kronecker) for each in (base, *sources)):
        return Merge(merge_posteriors(base, sources, weights, floor=floor))
    merged, solution = merge_kronecker(
        _shrunk(base, shrinkage),
        [_shrunk(source, shrinkage) for source in sources],
        weights,
        floor=floor,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return Merge(merged, {"iterations": float(solution.iterations), "residual": solution.residual})


def _shrunk(posterior: Posterior, shrinkage: float) -> Posterior:
    return posterior.shrunk(shrinkage) if isinstance(posterior, Kronecker) else posterior
