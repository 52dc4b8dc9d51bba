"""The ladder: every named method is the rule with special precisions.

linear               all S_t equal, sum alpha = 1
task_arithmetic      all S_t = S_0
hessian_weighted     S_0 = 0
gradient_matching    S_t = S_0 + H_t
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior

EXACT = {"rtol": 0, "atol": 1e-13}
WEIGHTS = {"simplex": (0.5, 0.3, 0.2), "ones": (1.0, 1.0, 1.0), "removal": (0.9, 0.8, -0.02)}


def _draw(seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """theta_0, the means, and positive numbers to build precisions from."""
    generator = torch.Generator().manual_seed(seed)
    base, *rest = torch.randn(7, 6, 5, generator=generator, dtype=torch.float64)
    return base, rest[:3], [each.exp() for each in rest[3:]]


def _merge(method: str, base: Posterior, sources: Sequence[Posterior], weights: Sequence[float]) -> Posterior:
    return get_method(method).kernel(base, sources, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("prior", [0.1, 2.5])
@pytest.mark.parametrize("family", ["isotropic", "diagonal"])
def test_linear_is_the_rule_with_equal_precisions_on_the_simplex(family: str, prior: float) -> None:
    origin, means, positive = _draw(1)
    base = Isotropic(origin, prior)
    sources = [Isotropic(m, 2.5) if family == "isotropic" else Diagonal(m, positive[0]) for m in means]
    for weights in ((0.5, 0.3, 0.2), (1.5, -1.0, 0.5)):
        rule = _merge("posterior", base, sources, weights)
        torch.testing.assert_close(_merge("linear", base, sources, weights).mean, rule.mean, **EXACT)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("family", ["isotropic", "diagonal"])
def test_task_arithmetic_is_the_rule_with_prior_precisions(family: str, weights: tuple[float, ...]) -> None:
    origin, means, positive = _draw(2)
    precision = torch.tensor(0.7, dtype=torch.float64) if family == "isotropic" else positive[0]
    build = Isotropic if family == "isotropic" else Diagonal
    base, sources = build(origin, precision), [build(m, precision) for m in means]
    rule, seen = (_merge(name, base, sources, weights) for name in ("posterior", "task_arithmetic"))
    assert type(seen) is type(rule)
    torch.testing.assert_close(seen.mean, rule.mean, **EXACT)
    torch.testing.assert_close(seen.precision_tensor(), rule.precision_tensor(), **EXACT)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_hessian_weighted_is_the_rule_as_the_prior_becomes_flat(weights: tuple[float, ...]) -> None:
    origin, means, positive = _draw(3)
    sources = [Diagonal(m, s) for m, s in zip(means, positive, strict=True)]
    seen = _merge("hessian_weighted", Isotropic(origin, 1.0), sources, weights)
    flat = Isotropic.unchecked(origin, torch.zeros((), dtype=torch.float64))
    nearly_flat = Isotropic(origin, 1e-15)
    for base in (flat, nearly_flat):
        rule = _merge("posterior", base, sources, weights)
        torch.testing.assert_close(seen.mean, rule.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(seen.precision_tensor(), rule.precision_tensor(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("prior", ["scalar", "tensor"])
def test_gradient_matching_is_the_rule_with_curvature_on_top_of_the_prior(
    prior: str, weights: tuple[float, ...]
) -> None:
    """Both against the paper's own form, with Hessians H_t and not precisions."""
    origin, means, hessians = _draw(4)
    base_hessian = torch.full_like(origin, 0.7) if prior == "scalar" else hessians[0].square()
    base = Isotropic(origin, 0.7) if prior == "scalar" else Diagonal(origin, base_hessian)
    sources = [Diagonal(m, base_hessian + h) for m, h in zip(means, hessians, strict=True)]
    total = base_hessian + sum(a * h for a, h in zip(weights, hessians, strict=True))
    wanted = origin + sum(
        a * (base_hessian + h) / total * (m - origin) for a, h, m in zip(weights, hessians, means, strict=True)
    )
    for name in ("gradient_matching", "posterior"):
        seen = _merge(name, base, sources, weights)
        torch.testing.assert_close(seen.mean, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen.precision_tensor(), total, **EXACT)


def test_on_the_simplex_all_methods_with_precisions_agree() -> None:
    origin, means, positive = _draw(5)
    sources = [Diagonal(m, 0.3 + s) for m, s in zip(means, positive, strict=True)]
    wanted = _merge("hessian_weighted", Isotropic(origin, 0.3), sources, WEIGHTS["simplex"])
    for name in ("gradient_matching", "posterior"):
        seen = _merge(name, Isotropic(origin, 0.3), sources, WEIGHTS["simplex"])
        torch.testing.assert_close(seen.mean, wanted.mean, **EXACT)
        torch.testing.assert_close(seen.precision_tensor(), wanted.precision_tensor(), **EXACT)


def test_a_source_without_precision_counts_as_task_arithmetic_in_the_rule() -> None:
    """One source knows its curvature and one does not: S_t = S_0 adds a task vector, shrunk by what the other knows."""
    origin, means, positive = _draw(6)
    base = Isotropic(origin, 0.5)
    sources = [Isotropic(means[0], 0.5), Diagonal(means[1], 0.5 + positive[0])]
    seen = _merge("posterior", base, sources, (1.0, 1.0))
    total = 0.5 + positive[0]
    wanted = origin + 0.5 / total * (means[0] - origin) + (means[1] - origin)
    torch.testing.assert_close(seen.mean, wanted, rtol=0, atol=1e-12)
