r"""Uncertainty-based gradient matching: m = theta_0 + sum_t alpha_t Hbar^-1 (H_0 + H_t) (m_t - theta_0)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import merge_method
from mergekit_bayes.posterior import merge_posteriors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method("gradient_matching", base="required", precision="required", prior="required", paper="arXiv 2310.12808")
def gradient_matching(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
) -> Posterior:
    r"""Base plus precision-weighted task vectors (uncertainty-based gradient matching).

        m = theta_0 + sum_t alpha_t Hbar^-1 (H_0 + H_t) (m_t - theta_0) ,     Hbar = H_0 + sum_t alpha_t H_t

    (Daheim et al., "Model merging by uncertainty-based gradient matching", ICLR 2024, arXiv
    2310.12808.) It is the rule of `mergekit_bayes.posterior.rule` with S_0 = H_0 the prior precision and S_t
    = H_0 + H_t the precision in a sidecar, which already includes the prior. Weights of one need no tuning.

    Args:
        base: mean theta_0 and prior precision H_0, shape (*weight).
        sources: the task posteriors, with precisions H_0 + H_t.
        weights: alpha_t, shape (sources,); negative ones remove a task.
        floor: lower bound for Hbar, which negative weights can make negative.

    Returns:
        The merged posterior; its values are not checked.
    """
    return merge_posteriors(base, sources, weights, floor=floor)
