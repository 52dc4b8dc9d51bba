r"""Isotropic merging in common and task-specific subspaces: the flat spectrum, with room kept for every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.merge.spectral import Spectrum
    from mergekit_bayes.posterior import Posterior


@merge_method(
    "iso_cts",
    base="required",
    precision="unused",
    prior="unused",
    paper="arXiv 2502.04959",
    parameters=(
        Parameter("scale", float, 1.0, help="multiplies the merged task vector; 1 to 1.5 in the paper"),
        Parameter("common_fraction", float, 0.8, minimum=0.0, maximum=1.0, help="share of common directions"),
    ),
    scope="tensor",
)
def iso_cts(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    scale: float = 1.0,
    common_fraction: float = 0.8,
) -> Merge:
    r"""Leading directions of the sum, and of what each task has beside them, with one singular value.

        m = theta_0 + scale mean(sigma) U' V'^T ,     S = S_0
        U' = nearest isometry to [U_c, U_1 .. U_T] ,     V' = nearest isometry to [V_c, V_1 .. V_T]
        U_c, V_c: the leading singular vectors of M = sum_t M_t ,     M_t = alpha_t (m_t - theta_0)
        U_t, V_t: those of M_t - U_c U_c^T M_t ,     sigma: the singular values of all of them

    (Marczak et al., "No task left behind: Isotropic model merging with common and task-specific subspaces", arXiv
    2502.04959, Iso-CTS.) Of the R directions of M, T round((1 - common_fraction) R / T) are given to the tasks, in
    equal parts, and the rest to the common subspace; T counts the sources that move the matrix at all. Tensors that are
    no matrices, and sums of low rank, are treated as by `iso_c`.

    Args:
        base: mean theta_0, shape (*weight); its precision is the precision of the result.
        sources: means m_t; their precisions are not looked at.
        weights: alpha_t, shape (sources,); the paper's are 1.
        floor: without effect, S_0 cannot lose positivity.
        scale: multiplies the merged task vector; the paper tunes it on validation data.
        common_fraction: share of the directions that come from the sum; 0.8 in the paper.

    Returns:
        The merge, and as measures `rank`, `common_rank` and `singular_value`, what all singular values become.
    """
    from mergekit_bayes.merge.spectral import average, is_matrix, isometry, joined, size_of, spectrum, task_matrices

    check_inputs(sources, weights, base=base)
    alpha = weights.to(base.mean.dtype)
    if not is_matrix(base.mean):
        return Merge(base.with_mean(average(base, sources, alpha, scale)))
    matrices = task_matrices(base, sources, alpha)
    if not matrices:
        return Merge(base.with_mean(base.mean.clone()), {"rank": 0.0, "common_rank": 0.0, "singular_value": 0.0})
    size = size_of(matrices, base.mean)
    whole = spectrum(sum(matrices[1:], start=matrices[0]), size)
    share = task_share(whole.sigma.numel(), len(matrices), common_fraction)
    common = whole.top(whole.sigma.numel() - share * len(matrices))
    parts = joined([common, *(spectrum(beside(common, matrix), size).top(share) for matrix in matrices)])
    rank = parts.sigma.numel()
    value = float(parts.sigma.mean()) if rank else 0.0
    merged = (isometry(parts.u) @ isometry(parts.v).T).mul_(value * scale).add_(base.mean)
    measures = {"rank": float(rank), "common_rank": float(common.sigma.numel()), "singular_value": value}
    return Merge(base.with_mean(merged), measures)


def task_share(rank: int, tasks: int, common_fraction: float) -> int:
    """How many of `rank` directions each task gets: the common ones keep int(rank * common_fraction), or nearly."""
    return min(rank // tasks, round((rank - int(rank * common_fraction)) / tasks))


def beside(common: Spectrum, matrix: Tensor) -> Tensor:
    """A task's matrix without the common left singular vectors."""
    return matrix - common.u @ (common.u.T @ matrix)
