r"""TIES: trim task vectors, elect a sign for every entry, average what agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "ties",
    base="required",
    precision="unused",
    prior="unused",
    paper="arXiv 2306.01708",
    parameters=(
        Parameter("density", float, 1.0, minimum=0.0, maximum=1.0, per_source=True, help="share of entries kept"),
        Parameter("normalize", bool, True, help="divide by the weights of the sources that agree"),
        Parameter("lambda", float, 1.0, help="multiplies the merged task vector"),
        Parameter("rescale", bool, False, help="give trimmed task vectors their old sum of magnitudes"),
        Parameter("int8_mask", bool, False, help="mergekit's; without effect on the weights"),
    ),
    scope="tensor",
)
def ties(  # noqa: PLR0913  (a kernel and its options)
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    density: float | Sequence[float] = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
) -> Merge:
    r"""Sign election on trimmed task vectors, then the average of those that agree.

        m = theta_0 + lambda (sum_t alpha_t M_t tau_t) / (sum_t alpha_t M_t) ,     S = S_0
        M_t = [sign(alpha_t tau_t) = sign(sum_s alpha_s tau_s)] ,     tau_t = trim(m_t - theta_0)

    entry by entry (Yadav et al., "TIES-Merging: Resolving interference when merging models", arXiv 2306.01708), as
    mergekit does it: the trim is per tensor, weights enter the election, a sum of exactly zero elects the positive
    sign, and a denominator of zero is one. Of entries just as large as the smallest one kept the first are kept, where
    mergekit leaves the choice to an unstable sort; differences of 16-bit weights often repeat. The paper trims to
    density 0.2 over all tensors together and averages without weights; the default density is mergekit's.

    Args:
        base: mean theta_0, shape (*weight); its precision is the precision of the result.
        sources: means m_t; their precisions are not looked at.
        weights: alpha_t, shape (sources,); negative ones remove a task.
        floor: without effect, S_0 cannot lose positivity.
        density: share of the entries of a task vector that are kept, one for all or one per source.
        normalize: False leaves the denominator out.
        lambda_: multiplies the merged task vector.
        rescale: keep the sum of magnitudes of a task vector when trimming.

    Returns:
        The merge, and as measure `conflicts`: the share of the entries kept in some source that lost an election.
    """
    import torch

    from mergekit_bayes.merge.consensus import elect, trim

    check_inputs(sources, weights, base=base)
    densities = [density] * len(sources) if isinstance(density, int | float) else list(density)
    alpha = weights.to(base.mean.dtype).view(-1, *[1] * base.mean.dim())
    votes = base.mean.new_empty((len(sources), *base.mean.shape))
    for position, (source, share) in enumerate(zip(sources, densities, strict=True)):
        votes[position] = trim(source.mean - base.mean, share, rescale=rescale)
    votes *= alpha
    agrees = elect(votes, undecided=1.0)
    cast, won = int((votes != 0).sum()), int(agrees.sum())
    merged = votes.mul_(agrees).sum(dim=0)
    if normalize:
        divisor = (alpha * agrees).sum(dim=0)
        # Weights that cancel leave their rounding behind, in an order of their own.
        nothing = divisor.abs() <= 4 * torch.finfo(alpha.dtype).eps * alpha.abs().sum()
        merged /= divisor.masked_fill_(nothing, 1.0)
    measures = {"conflicts": 1 - won / cast if cast else 0.0}
    return Merge(base.with_mean(merged.mul_(lambda_).add_(base.mean)), measures)
