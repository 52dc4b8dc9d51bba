r"""Weighted average of the means, the model soup: m = sum_t alpha_t m_t."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.errors import MethodError
from mergekit_bayes.merge.registry import Parameter, merge_method
from mergekit_bayes.posterior import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


def normalized(weights: tuple[float, ...], parameters: Mapping[str, object]) -> tuple[float, ...]:
    """Divide by the sum of the weights, if `normalize` asks for it.

    Raises:
        MethodError: the weights sum to zero (to rounding), so that no average exists.
    """
    if not parameters["normalize"]:
        return weights
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * max(map(abs, weights)):
        raise MethodError(
            f"merge method `linear`: weights {list(weights)} sum to zero and cannot be normalized; "
            "set `normalize: false`, or use `task_arithmetic` to add and subtract task vectors"
        )
    return tuple(weight / total for weight in weights)


@merge_method(
    "linear",
    base="unused",
    precision="unused",
    prior="unused",
    paper="arXiv 2203.05482",
    parameters=(Parameter("normalize", bool, True, help="divide the weights by their sum"),),
    weights=normalized,
)
def linear(base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None) -> Posterior:
    r"""Weighted average of the means (model soup).

        m = sum_t alpha_t m_t ,     S = S_0

    The rule of `mergekit_bayes.posterior.rule` when all precisions equal S_0 and the weights sum to one
    (Wortsman et al., "Model soups", arXiv 2203.05482).

    Args:
        base: only its precision is used, as the precision of the result.
        sources: their means, shape (*weight), are averaged; their precisions are not looked at.
        weights: alpha_t, shape (sources,).
        floor: without effect, S_0 cannot lose positivity.

    Returns:
        The average, with the precision of `base`.
    """
    check_inputs(sources, weights)
    alpha = weights.to(base.mean.dtype)
    mean = sources[0].mean * alpha[0]
    for position, source in enumerate(sources[1:], start=1):
        mean.add_(source.mean * alpha[position])
    return base.with_mean(mean)
