"""The merges that are compared, by the registered kernels, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from evaluation.merging.methods import run_kernel
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
DELTA = 1e-12
"""delta_0 of the paper's script, the prior precision beside the curvature of the base."""


@dataclass(frozen=True)
class Model:
    """One trained model: tensors, the curvature of its mean loss, and N, the rows of its training data."""

    means: Mapping[str, Tensor]
    curvature: Mapping[str, Tensor] | None
    rows: int

    def summed(self, name: str) -> Tensor:
        """N F of one tensor, the curvature of the summed loss."""
        assert self.curvature is not None
        return self.curvature[name] * self.rows


def merge(method: str, scale: float, base: Model, experts: Sequence[Model]) -> dict[str, Tensor]:
    """Merge all tensors with the same weight for every expert.

    With the precisions of the paper: H_0 = N_0 F_0 + delta_0 and S_t = H_0 + N_t F_t for `gradient_matching`, and
    N_t F_t + delta_0 for `hessian_weighted`, which knows no base and whose mean does not depend on the scale.

    Args:
        method: `task_arithmetic`, `hessian_weighted` or `gradient_matching`.
        scale: alpha of every expert.
        base: what the experts were made from.
        experts: with the same tensors.

    Returns:
        The merged tensors by name.
    """
    return {name: _merge_tensor(method, scale, name, base, experts) for name in base.means}


def _merge_tensor(method: str, scale: float, name: str, base: Model, experts: Sequence[Model]) -> Tensor:
    start, weights = base.means[name], [scale] * len(experts)
    if method == "task_arithmetic":
        plain = [Isotropic(expert.means[name], 1.0) for expert in experts]
        return run_kernel(method, Isotropic(start, 1.0), plain, weights, {})
    prior = base.summed(name) + DELTA if method == "gradient_matching" else DELTA
    sources: list[Posterior] = [Diagonal(expert.means[name], expert.summed(name) + prior) for expert in experts]
    first = Diagonal(start, prior) if isinstance(prior, Tensor) else Isotropic(start, prior)
    return run_kernel(method, first, sources, weights, {})
