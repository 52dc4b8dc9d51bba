r"""Precision-weighted average without a base: m = (sum_t alpha_t S_t)^-1 sum_t alpha_t S_t m_t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.errors import MethodError
from mergekit_bayes.merge.registry import merge_method
from mergekit_bayes.posterior import Isotropic, check_inputs, merge_posteriors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


def not_all_zero(weights: tuple[float, ...], parameters: Mapping[str, object]) -> tuple[float, ...]:
    """Keep the weights as they are: there is no base to fall back on when all of them are zero.

    Raises:
        MethodError: every weight is zero.
    """
    if not any(weights):
        raise MethodError("merge method `hessian_weighted`: all weights are zero; there is nothing to average")
    return weights


@merge_method(
    "hessian_weighted",
    aliases=("fisher",),
    base="unused",
    precision="required",
    prior="unused",
    paper="arXiv 2111.09832",
    weights=not_all_zero,
)
def hessian_weighted(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
) -> Posterior:
    r"""Precision-weighted average of the means, without a base (Fisher averaging).

        S = sum_t alpha_t S_t ,     m = S^-1 sum_t alpha_t S_t m_t

    The rule of `mergekit_bayes.posterior.rule` with a flat prior, S_0 = 0 (Matena and Raffel, "Merging models
    with Fisher-weighted averaging", arXiv 2111.09832). With S_0 = 0 the mean theta_0 around which the rule
    computes drops out, so it can be chosen: the first source keeps rounding at the size of the differences
    between sources. A floor acts as a prior there, and for it to be the same for any order of sources,
    theta_0 is then their plain average.

    Weights are not normalised: the mean does not depend on their scale, and the precision should. Weights
    summing to one average the evidence, weights of one add it up.

    Args:
        base: not used.
        sources: the task posteriors, shape (*weight).
        weights: alpha_t, shape (sources,).
        floor: lower bound for S, which negative weights can make negative.

    Returns:
        The merged posterior; its values are not checked.
    """
    check_inputs(sources, weights)
    first = sources[0].mean
    origin = first if floor is None else _average([source.mean for source in sources])
    flat = Isotropic.unchecked(origin, first.new_zeros(()))
    return merge_posteriors(flat, sources, weights, floor=floor)


def _average(means: Sequence[Tensor]) -> Tensor:
    total = means[0].clone()
    for mean in means[1:]:
        total.add_(mean)
    return total.div_(len(means))
