r"""The rule with the input curvature of every linear layer: S_t = S_0 + I (x) A_t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import Kronecker, check_inputs, merge_kronecker, merge_posteriors
from mergekit_bayes.posterior.kronecker import as_kronecker

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "gram",
    aliases=("regmean",),
    base="required",
    precision="required",
    prior="required",
    paper="arXiv 2212.09849",
    parameters=(
        Parameter(
            "shrinkage",
            float,
            0.1,
            minimum=0.0,
            maximum=1.0,
            help="how far off-diagonal entries of the factors are drawn to zero",
        ),
    ),
    scope="tensor",
    inputs_only=True,
    entrywise=True,
    families=("isotropic", "diagonal", "kronecker"),
)
def gram(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    shrinkage: float = 0.1,
) -> Merge:
    r"""Posterior merging with the input curvature per linear layer (RegMean).

        m = theta_0 + sum_t alpha_t (m_t - theta_0) (S_0 + A_t) (S_0 + sum_s alpha_s A_s)^-1

    with A_t the second moment of a layer's inputs, summed over the training units (Jin et al., "Dataless knowledge
    fusion by merging weights of language models", arXiv 2212.09849). RegMean itself is S_0 = 0, where the base drops
    out; here the prior decides in directions that no task has seen. Output factors, where a sidecar has them, only
    count by their mean diagonal, and what is diagonal is averaged over the outputs, so that the system has a closed
    form. Tensors without factors are merged by the precision they have, as by `gradient_matching`: with none, and
    weights that sum to one, that is RegMean's plain average.

    Shrinkage multiplies off-diagonal entries of A_t by 1 - shrinkage, as RegMean does, by 0.9 in most of its
    experiments; without it inputs that are nearly collinear get weights of arbitrary size.

    Args:
        base: mean theta_0 and prior precision S_0, shape (*weight).
        sources: the task posteriors, S_t including the prior.
        weights: alpha_t, shape (sources,); negative ones remove a task.
        floor: lower bound for the diagonal part of S, which negative weights can make negative.
        shrinkage: between 0 and 1.

    Returns:
        The merge, without measures.
    """
    if not any(isinstance(each, Kronecker) for each in (base, *sources)):
        return Merge(merge_posteriors(base, sources, weights, floor=floor))
    check_inputs(sources, weights, base=base)
    prior, *inputs = [as_kronecker(each).inputs_only().shrunk(shrinkage) for each in (base, *sources)]
    return Merge(merge_kronecker(prior, inputs, weights, floor=floor)[0])
