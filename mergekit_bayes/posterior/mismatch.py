r"""What a merge will cost each source, before it is evaluated.

The rule replaces each task's loss by the quadratic its posterior stands for; what is lost at the merged mean
is, to second order and per source t,

    1/2 (m - m_t)^T (S_t - S_0) (m - m_t) ,

for precisions that act entry by entry 1/2 sum (m - m_t)^2 (S_t - S_0). H_t = S_t - S_0 is the curvature of the
task's loss, summed over its training units (the correction of Khan, arXiv 2506.14262, and the gradient mismatch of
Daheim et al., arXiv 2310.12808).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_bayes.errors import ShapeMismatchError
from mergekit_bayes.posterior.eigenbasis import sum_of
from mergekit_bayes.posterior.mixture import Mixture

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior.family import Posterior

__all__ = ["mismatch"]


def mismatch(merged_mean: Tensor, source: Posterior, base: Posterior) -> Tensor:
    r"""The increase of the source's loss that its own posterior predicts: 1/2 (m - m_t)^T (S_t - S_0) (m - m_t).

    Exact for a quadratic loss with curvature S_t - S_0 and minimum m_t. When m_t minimises the loss plus the
    prior, so that a slope remains, it is the increase beyond that slope. Negative where the base is more
    certain than the source. For a mixture it is the average over its components, by their responsibilities at the
    merged mean and at the default temperature of `merge_mixtures`.

    Args:
        merged_mean: m, shape (*weight).
        source: the task posterior N(m_t, 1/S_t), shape (*weight).
        base: the prior, of which only the precision S_0 is used.

    Returns:
        0-dim, in units of the loss summed over the source's training units (nats for a log-likelihood).

    Raises:
        ShapeMismatchError: `merged_mean` has another shape than the source.
    """
    if merged_mean.shape != source.mean.shape:
        raise ShapeMismatchError(
            f"mismatch: merged mean of shape {tuple(merged_mean.shape)}, source of {tuple(source.mean.shape)}"
        )
    if isinstance(source, Mixture):
        shares = source.responsibilities(merged_mean, temperature=float(max(1, merged_mean.numel())))
        parts = [
            mismatch(merged_mean, each, base) * share for each, share in zip(source.components, shares, strict=True)
        ]
        return sum_of(parts)
    return source.quadratic(merged_mean - source.mean, beyond=base) / 2
