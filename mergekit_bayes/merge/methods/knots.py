r"""KnOTS: TIES in a basis that the task vectors share, found by decomposing them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "knots",
    base="required",
    precision="unused",
    prior="unused",
    paper="arXiv 2410.19735",
    parameters=(
        Parameter("density", float, 0.2, minimum=0.0, maximum=1.0, per_source=True, help="share of entries kept"),
        Parameter("scale", float, 1.0, help="multiplies the merged task vector"),
    ),
    scope="tensor",
)
def knots(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
) -> Merge:
    r"""Sign election on the right factors of a joint singular value decomposition (KnOTS-TIES).

        m = theta_0 + scale U X ,     S = S_0
        U diag(sigma) [V_1^T .. V_T^T] = [M_1 .. M_T] ,     M_t = alpha_t (m_t - theta_0)
        X = (sum_t A_t Z_t) / (sum_t A_t) ,     Z_t = trim(diag(sigma) V_t^T) ,     A_t = [sign(Z_t) = sign(sum_s Z_s)]

    (Stoica et al., "Model merging with SVD to tie the knots", arXiv 2410.19735.) Made for LoRA, whose updates share
    few directions as they stand. The paper trims over all layers together, here each matrix is trimmed by itself. An
    entry whose votes cancel exactly is left at the base's, so that the signs of singular vectors do not matter. Tensors
    that are no matrices are merged in the basis they have: by trim, election and plain mean of what agrees.

    Args:
        base: mean theta_0, shape (*weight); its precision is the precision of the result.
        sources: means m_t; their precisions are not looked at.
        weights: alpha_t, shape (sources,); the paper's are 1.
        floor: without effect, S_0 cannot lose positivity.
        density: share of the entries of diag(sigma) V_t^T that are kept, one for all or one per source; 0.2 in the
            paper's code.
        scale: multiplies the merged task vector; the paper tunes it on validation data.

    Returns:
        The merge, and as measures `rank` of the joint decomposition and `conflicts`: the share of the entries kept in
        some source that lost an election.
    """
    import torch

    from mergekit_bayes.merge.consensus import elect, trim
    from mergekit_bayes.merge.spectral import coordinates, is_matrix, shared_basis, size_of

    check_inputs(sources, weights, base=base)
    alpha = weights.to(base.mean.dtype)
    densities = [density] * len(sources) if isinstance(density, int | float) else list(density)
    moved = [(source.mean - base.mean) * alpha[position] for position, source in enumerate(sources)]
    basis = None
    if is_matrix(base.mean):
        basis = shared_basis(moved, size_of(moved, base.mean))
        moved = [coordinates(basis, each) for each in moved]  # diag(sigma) V_t^T
    votes = torch.stack([trim(each, share) for each, share in zip(moved, densities, strict=True)])
    agrees = elect(votes, undecided=0.0)
    cast, won = int((votes != 0).sum()), int(agrees.sum())
    elected = votes.mul_(agrees).sum(dim=0).div_(agrees.sum(dim=0).clamp_min_(1))
    merged = elected if basis is None else basis @ elected
    measures = {"conflicts": 1 - won / cast if cast else 0.0}
    if basis is not None:
        measures["rank"] = float(basis.shape[1])
    return Merge(base.with_mean(merged.mul_(scale).add_(base.mean)), measures)
