r"""The rule every merge method is a special case of.

With prior q_0 and task posteriors q_t, the merge is

    q = q_0 prod_t (q_t / q_0)^alpha_t ,

that is, natural parameters add (Khan, "Knowledge adaptation as posterior correction", arXiv 2506.14262;
Monzón Maldonado et al., "Variational model merging for Pareto front estimation", arXiv 2412.08147). For
Gaussians q_t = N(m_t, 1/S_t) and q_0 = N(theta_0, 1/S_0):

    S = S_0 + sum_t alpha_t (S_t - S_0)
    m = theta_0 + S^-1 sum_t alpha_t S_t (m_t - theta_0)

    all S_t equal, sum alpha = 1      average of the means
    all S_t = S_0                     task arithmetic
    S_0 = 0                           precision-weighted average
    S_t = S_0 + H_t                   uncertainty-based gradient matching
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.errors import MethodError
from mergekit_bayes.posterior.family import Posterior, check_alike, richest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_inputs", "merge_posteriors"]


def merge_posteriors(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
) -> Posterior:
    r"""Merge `sources` around `base`: m = theta_0 + S^-1 sum_t alpha_t S_t (m_t - theta_0).

    The result belongs to the richest family among the arguments. Its values are not checked, so that the rule
    can run inside a compiled loop: with negative weights S can lose positivity. Call `.check()` on the
    result, or give a floor.

    Args:
        base: mean theta_0 and prior precision S_0, shape (*weight).
        sources: the task posteriors q_t, S_t including the prior; same shape and dtype as `base`.
        weights: alpha_t, shape (sources,), floating point, on the same device; negative ones remove a task.
            Sums and differences of weights are taken in their own dtype.
        floor: lower bound for S, applied before dividing; None for none.

    Returns:
        The merged posterior, in the dtype of `base`.

    Raises:
        MethodError: no source, or not one weight per source.
        ShapeMismatchError: base and sources differ in shape, dtype or device.
    """
    check_inputs(sources, weights, base=base)
    return richest((base, *sources)).merge(base, sources, weights, floor=floor)


def check_inputs(sources: Sequence[Posterior], weights: Tensor, *, base: Posterior | None = None) -> None:
    """Refuse what arithmetic would broadcast in silence; legal inside a compiled loop.

    Args:
        sources: at least one, all of the same tensor.
        weights: shape (sources,).
        base: of the same tensor as well; None where a method does not use it.

    Raises:
        MethodError: no source, or not one weight per source.
        ShapeMismatchError: base and sources differ in shape, dtype or device.
    """
    if not sources or weights.shape != (len(sources),):
        raise MethodError(f"{len(sources)} sources with weights of shape {tuple(weights.shape)}: one weight each")
    check_alike(sources if base is None else (base, *sources))
