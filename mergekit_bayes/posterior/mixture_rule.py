r"""The rule for mixtures, at the mode of the merged density.

    log q(w) = (1 - sum_t alpha_t) log q_0(w) + sum_t alpha_t log sum_k pi_tk q_tk(w) + const

has one peak per choice of components. From the average of them all, expectation maximisation climbs to a near one:

    rho_tk = pi_tk q_tk(m)^(1/T) / sum_j pi_tj q_tj(m)^(1/T)
    m = the rule with the components as sources and alpha_t rho_tk as weights

(a few such steps are what Monzón Maldonado et al., arXiv 2412.08147, take). The log-densities of a tensor grow with the
number of its entries, so that without a temperature T every rho is 0 or 1 after one step; T tempers them. The steps
then climb

    (1 - sum_t alpha_t) log q_0(m) + sum_t alpha_t T log sum_k pi_tk q_tk(m)^(1/T) ,

because for weights that are not negative each task's share is, by Jensen's inequality, at least what the
responsibilities of the present m give it, with equality there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.errors import MethodError
from mergekit_bayes.posterior.mixture import Mixture, shares
from mergekit_bayes.posterior.rule import check_inputs, merge_posteriors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior.family import Posterior

__all__ = ["Ascent", "merge_mixtures"]


class Ascent(NamedTuple):
    """How expectation maximisation went.

    Attributes:
        responsibilities: rho_tk, by source and component; each source's sum to one.
        objectives: the tempered log-density at the mean after every step, up to a constant.
        converged: whether the responsibilities stood still before the steps ran out.
    """

    responsibilities: tuple[tuple[float, ...], ...]
    objectives: tuple[float, ...]
    converged: bool


def merge_mixtures(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    temperature: float = 1.0,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
) -> tuple[Posterior, Ascent]:
    r"""Merge mixtures by the rule, and say which components it leans on.

    Args:
        base: theta_0 and S_0, not a mixture, shape (*weight).
        sources: the task posteriors q_t; those that are no mixture count as one component.
        weights: alpha_t, shape (sources,); negative ones only for sources of one component.
        floor: lower bound for S, as in `merge_posteriors`; the ascent is only sure to climb where it does not act.
        temperature: T per entry of the tensor; at 1, components are compared by their log-density per entry, and a
            small number chooses one component of each task.
        tolerance: largest change of a responsibility at which the steps stop.
        max_iterations: largest number of steps.

    Returns:
        The Gaussian at the peak, S = S_0 + sum_t alpha_t (sum_k rho_tk S_tk - S_0), and the ascent.

    Raises:
        MethodError: the base is a mixture, a negative weight on several components, a temperature that is not positive.
    """
    check_inputs(sources, weights, base=base)
    tasks = [each if isinstance(each, Mixture) else Mixture.unchecked([each]) for each in sources]
    alpha = [float(each) for each in weights]
    _check(base, tasks, alpha, temperature)
    total = temperature * max(1, base.mean.numel())
    # log q at its own mean: the constant that a component's quadratic is subtracted from
    peaks = [
        [float(each.log_density(each.mean)) if len(task.components) > 1 else 0.0 for each in task.components]
        for task in tasks
    ]
    rho = tuple(tuple(math.exp(each) for each in task.log_weights) for task in tasks)
    components = [each for task in tasks for each in task.components]
    objectives: list[float] = []
    while True:
        flat = [a * share for a, row in zip(alpha, rho, strict=True) for share in row]
        merged = merge_posteriors(base, components, weights.new_tensor(flat), floor=floor)
        logs = [_log_densities(task, row, merged.mean) for task, row in zip(tasks, peaks, strict=True)]
        objectives.append(_objective(base, merged.mean, tasks, alpha, logs, total))
        new = tuple(shares(task.log_weights, row, total) for task, row in zip(tasks, logs, strict=True))
        moved = max(abs(a - b) for old, row in zip(rho, new, strict=True) for a, b in zip(old, row, strict=True))
        if moved <= tolerance or len(objectives) >= max_iterations:
            return merged, Ascent(rho, tuple(objectives), moved <= tolerance)
        rho = new


def _check(base: Posterior, tasks: Sequence[Mixture], alpha: Sequence[float], temperature: float) -> None:
    if isinstance(base, Mixture):
        raise MethodError("mixture merge: the base is a mixture; the prior must be a single Gaussian")
    if not 0 < temperature < math.inf:
        raise MethodError(f"mixture merge: temperature is {temperature}; it must be positive")
    for position, (task, weight) in enumerate(zip(tasks, alpha, strict=True)):
        if weight < 0 and len(task.components) > 1:
            raise MethodError(
                f"mixture merge: source {position} has weight {weight:g} and {len(task.components)} components; "
                "only a source with a single posterior can be removed"
            )


def _log_densities(task: Mixture, peaks: Sequence[float], mean: Tensor) -> list[float]:
    if len(peaks) == 1:  # whose only share is one, whatever its density
        return [-float(task.components[0].quadratic(mean - task.components[0].mean)) / 2]
    return [
        peak - float(each.quadratic(mean - each.mean)) / 2 for peak, each in zip(peaks, task.components, strict=True)
    ]


def _objective(
    base: Posterior,
    mean: Tensor,
    tasks: Sequence[Mixture],
    alpha: Sequence[float],
    logs: Sequence[Sequence[float]],
    temperature: float,
) -> float:
    value = -(1 - math.fsum(alpha)) * float(base.quadratic(mean - base.mean)) / 2
    for task, weight, row in zip(tasks, alpha, logs, strict=True):
        tempered = [w + each / temperature for w, each in zip(task.log_weights, row, strict=True)]
        highest = max(tempered)
        value += weight * temperature * (highest + math.log(math.fsum(math.exp(each - highest) for each in tempered)))
    return value
