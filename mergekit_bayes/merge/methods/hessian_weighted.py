r"""Precision-weighted average without a base: m = (sum_t alpha_t S_t)^-1 sum_t alpha_t S_t m_t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import merge_method
from mergekit_bayes.posterior import Isotropic, merge_posteriors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "hessian_weighted",
    aliases=("fisher",),
    base="unused",
    precision="required",
    prior="unused",
    paper="arXiv 2111.09832",
)
def hessian_weighted(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
) -> Posterior:
    r"""Precision-weighted average of the means, without a base (Fisher averaging).

        S = sum_t alpha_t S_t ,     m = S^-1 sum_t alpha_t S_t m_t

    The rule of `mergekit_bayes.posterior.rule` with a flat prior, S_0 = 0 (Matena and Raffel, "Merging models
    with Fisher-weighted averaging", arXiv 2111.09832; Daheim et al., arXiv 2310.12808, section 3.2). With S_0
    = 0 the base's mean drops out whatever it is, so the first source takes its place: rounding then happens
    at the size of the differences between sources, which matters when negative weights make S small.

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
    flat = Isotropic.unchecked(sources[0].mean, weights.new_zeros((), dtype=sources[0].mean.dtype))
    return merge_posteriors(flat, sources, weights, floor=floor)
