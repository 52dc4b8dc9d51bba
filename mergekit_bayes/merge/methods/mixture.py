r"""The rule for several posteriors per task: a merge that leans on those that suit the other tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.merge.registry import Merge, Parameter, merge_method
from mergekit_bayes.posterior import Mixture, merge_mixtures, merge_posteriors

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.posterior import Posterior


@merge_method(
    "mixture",
    base="required",
    precision="required",
    prior="required",
    paper="arXiv 2412.08147",
    parameters=(
        Parameter("temperature", float, 1.0, minimum=1e-9, help="how evenly components are used; small picks one each"),
        Parameter("tolerance", float, 1e-4, minimum=0.0, help="largest change of a responsibility to stop at"),
        Parameter("max_iterations", int, 50, minimum=1, help="largest number of steps"),
    ),
    scope="tensor",
    entrywise=True,
    families=("isotropic", "diagonal", "kronecker", "mixture"),
)
def mixture(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    temperature: float = 1.0,
    tolerance: float = 1e-4,
    max_iterations: int = 50,
) -> Merge:
    r"""Posterior merging with several posteriors per task, by expectation maximisation.

        m = theta_0 + S^-1 sum_t alpha_t sum_k rho_tk S_tk (m_tk - theta_0)
        S = S_0 + sum_t alpha_t sum_k rho_tk (S_tk - S_0) ,     rho_tk ~ pi_tk q_tk(m)^(1/T)

    iterated from rho = pi (Monzón Maldonado et al., "Variational model merging for Pareto front estimation in
    multitask finetuning", arXiv 2412.08147); every step raises the tempered log-density of the merge. Responsibilities
    rho are per tensor. T is the temperature times the number of entries of the tensor: log-densities are sums over the
    entries, whose differences would otherwise make every rho 0 or 1 in all but the smallest tensors; at temperature 1
    components are compared by their log-density per entry. Tasks with one posterior are merged as by `posterior`, and
    Kronecker factors of components are taken as they are, without shrinkage.

    Args:
        base: mean theta_0 and prior precision S_0, shape (*weight).
        sources: the task posteriors, one mixture per task, S_tk including the prior.
        weights: alpha_t, shape (sources,), one per task; negative ones only for tasks with one posterior.
        floor: lower bound for S, as in the family of the components.
        temperature: positive.
        tolerance: largest change of a responsibility at which the steps stop.
        max_iterations: largest number of steps.

    Returns:
        The merge, a Gaussian; where a task has several posteriors, measures `iterations`, `objective` (in nats, up to a
        constant) and `responsibilities`, with one number for component k of the source at position t under "t.k".
    """
    if not any(isinstance(each, Mixture) for each in sources):
        return Merge(merge_posteriors(base, sources, weights, floor=floor))
    merged, ascent = merge_mixtures(
        base,
        sources,
        weights,
        floor=floor,
        temperature=temperature,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    rows = enumerate(ascent.responsibilities)
    found = {f"{task}.{component}": share for task, row in rows for component, share in enumerate(row)}
    measures = {"iterations": float(len(ascent.objectives)), "objective": ascent.objectives[-1]}
    return Merge(merged, {**measures, "responsibilities": found})
