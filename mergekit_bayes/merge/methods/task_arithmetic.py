r"""Base plus weighted task vectors: m = theta_0 + sum_t alpha_t (m_t - theta_0)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Parameter, merge_method
from mergekit_bayes.posterior import check_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


def scaled(weights: tuple[float, ...], parameters: Mapping[str, object]) -> tuple[float, ...]:
    """Multiply by `lambda` and, if `normalize` asks for it, divide by the sum of the weights.

    As in mergekit, a sum closer to zero than 1e-8 divides by one instead.
    """
    total = math.fsum(weights) if parameters["normalize"] else 1.0
    divisor = 1.0 if abs(total) < 1e-8 else total
    scale = parameters["lambda"]
    assert isinstance(scale, float)
    return tuple(weight / divisor * scale for weight in weights)


@merge_method(
    "task_arithmetic",
    base="required",
    precision="unused",
    prior="unused",
    paper="arXiv 2212.04089",
    parameters=(
        Parameter("normalize", bool, False, help="divide the weights by their sum"),
        Parameter("lambda", float, 1.0, help="multiplies all task vectors"),
        Parameter("density", float, 1.0, only=1.0, per_source=True, help="mergekit's sparsification; 1 keeps all"),
        Parameter("rescale", bool, False, help="mergekit's; without effect at density 1"),
        Parameter("int8_mask", bool, False, help="mergekit's; without effect at density 1"),
    ),
    weights=scaled,
)
def task_arithmetic(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
) -> Posterior:
    r"""Base plus weighted task vectors.

        m = theta_0 + sum_t alpha_t (m_t - theta_0) ,     S = S_0

    The rule of `mergekit_bayes.posterior.rule` when all precisions equal S_0 (Ilharco et al., "Editing models
    with task arithmetic", arXiv 2212.04089). Task vectors are formed first and added to the base last: the
    shorter form (1 - sum alpha) theta_0 + sum alpha_t m_t rounds at the size of the weights, this one at the
    size of what was learned, and sources equal to the base return it exactly.

    Args:
        base: mean theta_0, shape (*weight); its precision is the precision of the result.
        sources: means m_t; their precisions are not looked at.
        weights: alpha_t, shape (sources,); negative ones remove a task.
        floor: without effect, S_0 cannot lose positivity.

    Returns:
        The sum, with the precision of `base`.
    """
    check_inputs(sources, weights, base=base)
    alpha = weights.to(base.mean.dtype)
    pull = (sources[0].mean - base.mean).mul_(alpha[0])
    for position, source in enumerate(sources[1:], start=1):
        pull.add_((source.mean - base.mean).mul_(alpha[position]))
    return base.with_mean(pull.add_(base.mean))
