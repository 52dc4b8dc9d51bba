r"""Isotropic merging in the common subspace: the sum of the task vectors with a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "iso_c",
    base="required",
    precision="unused",
    prior="unused",
    paper="arXiv 2502.04959",
    parameters=(Parameter("scale", float, 1.0, help="multiplies the merged task vector; 1 to 1.5 in the paper"),),
    scope="tensor",
)
def iso_c(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None, scale: float = 1.0
) -> Merge:
    r"""Task arithmetic with all singular values replaced by their mean.

        m = theta_0 + scale mean(sigma) U V^T ,     S = S_0
        U diag(sigma) V^T = sum_t alpha_t (m_t - theta_0)

    (Marczak et al., "No task left behind: Isotropic model merging with common and task-specific subspaces", arXiv
    2502.04959, Iso-C.) Tensors that are no matrices get scale times the average of the weighted task vectors, as in the
    paper's code. For a sum of full rank this is that code; a sum of low rank, as adapters give, keeps its rank and its
    nuclear norm, where the code would spread the mean over directions that no task uses.

    Args:
        base: mean theta_0, shape (*weight); its precision is the precision of the result.
        sources: means m_t; their precisions are not looked at.
        weights: alpha_t, shape (sources,); the paper's are 1.
        floor: without effect, S_0 cannot lose positivity.
        scale: multiplies the merged task vector; the paper tunes it on validation data.

    Returns:
        The merge, and as measures `rank` of the sum and `singular_value`, the mean that all singular values become.
    """
    from mergekit_bayes.merge.spectral import average, is_matrix, size_of, spectrum, task_matrices

    check_inputs(sources, weights, base=base)
    alpha = weights.to(base.mean.dtype)
    if not is_matrix(base.mean):
        return Merge(base.with_mean(average(base, sources, alpha, scale)))
    matrices = task_matrices(base, sources, alpha)
    if not matrices:
        return Merge(base.with_mean(base.mean.clone()), {"rank": 0.0, "singular_value": 0.0})
    parts = spectrum(sum(matrices[1:], start=matrices[0]), size_of(matrices, base.mean))
    rank = parts.sigma.numel()
    value = float(parts.sigma.mean()) if rank else 0.0
    merged = (parts.u @ parts.v.T).mul_(value * scale).add_(base.mean)
    return Merge(base.with_mean(merged), {"rank": float(rank), "singular_value": value})
