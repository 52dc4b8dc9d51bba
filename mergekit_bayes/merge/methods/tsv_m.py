r"""Task singular vectors: the leading directions of every task, made orthogonal to those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "tsv_m",
    base="required",
    precision="unused",
    prior="unused",
    paper="arXiv 2412.00081",
    parameters=(Parameter("scale", float, 1.0, help="multiplies the merged task vector"),),
    scope="tensor",
)
def tsv_m(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None, scale: float = 1.0
) -> Merge:
    r"""Sum of the tasks' leading singular triples, decorrelated across tasks.

        m = theta_0 + scale U' diag(sigma_1, .., sigma_T) V'^T ,     S = S_0
        U' = nearest isometry to [U_1 .. U_T] ,     V' = nearest isometry to [V_1 .. V_T]
        U_t diag(sigma_t) V_t^T = the floor(min(shape) / T) leading singular triples of alpha_t (m_t - theta_0)

    (Gargiulo et al., "Task singular vectors: Reducing task interference in model merging", arXiv 2412.00081.) T counts
    the sources that move the matrix at all, and at least one triple of each is kept. Tensors that are no matrices get
    scale times the average of the weighted task vectors, as in the paper's code. Differs from it where the columns of
    [U_1 .. U_T] depend on one another: see `mergekit_bayes.merge.spectral`.

    Args:
        base: mean theta_0, shape (*weight); its precision is the precision of the result.
        sources: means m_t; their precisions are not looked at.
        weights: alpha_t, shape (sources,); the paper's are 1.
        floor: without effect, S_0 cannot lose positivity.
        scale: multiplies the merged task vector; 1 in the paper.

    Returns:
        The merge, and as measure `rank`: the number of triples it is made of.
    """
    from mergekit_bayes.merge.spectral import average, is_matrix, isometry, joined, size_of, spectrum, task_matrices

    check_inputs(sources, weights, base=base)
    alpha = weights.to(base.mean.dtype)
    if not is_matrix(base.mean):
        return Merge(base.with_mean(average(base, sources, alpha, scale)))
    matrices = task_matrices(base, sources, alpha)
    if not matrices:
        return Merge(base.with_mean(base.mean.clone()), {"rank": 0.0})
    share = max(1, min(base.mean.shape) // len(matrices))
    size = size_of(matrices, base.mean)
    parts = joined([spectrum(matrix, size).top(share) for matrix in matrices])
    merged = (isometry(parts.u) * parts.sigma) @ isometry(parts.v).T
    return Merge(base.with_mean(merged.mul_(scale).add_(base.mean)), {"rank": float(parts.sigma.numel())})
