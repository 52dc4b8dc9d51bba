r"""The rule itself: q = q_0 prod_t (q_t / q_0)^alpha_t, for whatever families the posteriors have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import merge_method
from mergekit_bayes.posterior import merge_posteriors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "posterior",
    base="required",
    precision="optional",
    prior="required",
    paper="arXiv 2506.14262",
    families=("isotropic", "diagonal", "kronecker", "mixture"),
)
def posterior(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
) -> Posterior:
    r"""Product of the task posteriors with the prior counted once.

        q = q_0 prod_t (q_t / q_0)^alpha_t
        S = S_0 + sum_t alpha_t (S_t - S_0) ,     m = theta_0 + S^-1 sum_t alpha_t S_t (m_t - theta_0)

    (Khan, "Knowledge adaptation as posterior correction", arXiv 2506.14262; Monzón Maldonado et al.,
    "Variational model merging", arXiv 2412.08147.) Unlike `gradient_matching` it does not ask every source
    for a precision: one without a sidecar has a mean and knows no more than the prior, S_t = S_0. With no
    sidecar at all this is task arithmetic. Kronecker factors are taken as they are and mixtures at their default
    temperature; `kronecker` and `mixture` are the same rule with parameters for those families.

    Args:
        base: mean theta_0 and prior precision S_0, shape (*weight).
        sources: the task posteriors, in any family.
        weights: alpha_t, shape (sources,); negative ones remove a task.
        floor: lower bound for S, which negative weights can make negative.

    Returns:
        The merged posterior, in the richest family among base and sources; its values are not checked.
    """
    return merge_posteriors(base, sources, weights, floor=floor)
