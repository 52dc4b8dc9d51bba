"""The rule: its definition as a product of densities, its special cases, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.errors import MethodError, NonPositivePrecisionError, ShapeMismatchError
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior, merge_posteriors
from mergekit_bayes.posterior.family import richest
from tests.posterior.other_family import Other

WEIGHTS = {
    "simplex": (0.5, 0.3, 0.2),
    "ones": (1.0, 1.0, 1.0),
    "small": (0.1, 0.2, 0.1),
    "removal": (0.9, 0.8, -0.02),
}


def _draw(seed: int, shape: tuple[int, ...] = (5, 7)) -> tuple[Diagonal, list[Diagonal]]:
    """A tensor prior, and three posteriors that have learned something everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = Diagonal(normal(), normal().exp())
    return base, [Diagonal(normal(), base.precision + normal().exp()) for _ in range(3)]


def _build(family: type[Posterior], mean: torch.Tensor, precision: torch.Tensor) -> Posterior:
    return Isotropic(mean, precision) if family is Isotropic else Diagonal(mean, precision)


def _assert_same(seen: Posterior, wanted: Posterior) -> None:
    torch.testing.assert_close(seen.mean, wanted.mean, rtol=1e-12, atol=1e-12)
    shape = seen.mean.shape
    left, right = seen.precision_tensor().expand(shape), wanted.precision_tensor().expand(shape)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_the_rule_is_a_product_of_powers_of_quotients(weights: tuple[float, ...]) -> None:
    base, sources = _draw(0)
    wanted: Posterior = base
    for source, alpha in zip(sources, weights, strict=True):
        evidence = source.quotient(base).power(abs(alpha))
        wanted = wanted.product(evidence) if alpha > 0 else wanted.quotient(evidence)
    _assert_same(merge_posteriors(base, sources, torch.tensor(weights, dtype=torch.float64)), wanted)


@pytest.mark.parametrize("family", [Isotropic, Diagonal])
def test_equal_precisions_on_the_simplex_average_the_means(family: type[Posterior]) -> None:
    base, sources = _draw(1)
    precision = torch.tensor(2.5, dtype=torch.float64)
    if family is Diagonal:
        precision = base.precision + 1
    alike = [_build(family, source.mean, precision) for source in sources]
    merged = merge_posteriors(base, alike, torch.tensor(WEIGHTS["simplex"], dtype=torch.float64))
    wanted = sum(alpha * source.mean for alpha, source in zip(WEIGHTS["simplex"], sources, strict=True))
    torch.testing.assert_close(merged.mean, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_prior_precisions_everywhere_add_task_vectors(weights: tuple[float, ...]) -> None:
    base, sources = _draw(2)
    ignorant = [Diagonal(source.mean, base.precision) for source in sources]
    merged = merge_posteriors(base, ignorant, torch.tensor(weights, dtype=torch.float64))
    pull = sum(alpha * (source.mean - base.mean) for alpha, source in zip(weights, sources, strict=True))
    _assert_same(merged, Diagonal(base.mean + pull, base.precision))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_a_flat_prior_averages_by_precision(weights: tuple[float, ...]) -> None:
    base, sources = _draw(3)
    flat = Isotropic.unchecked(base.mean, torch.zeros((), dtype=torch.float64))
    merged = merge_posteriors(flat, sources, torch.tensor(weights, dtype=torch.float64))
    precision = sum(alpha * source.precision for alpha, source in zip(weights, sources, strict=True))
    moment = sum(alpha * source.precision * source.mean for alpha, source in zip(weights, sources, strict=True))
    _assert_same(merged, Diagonal.unchecked(moment / precision, precision))


def test_on_the_simplex_the_base_drops_out_to_the_last_bit() -> None:
    base, sources = _draw(4)
    weights = torch.tensor((0.5, 0.25, 0.25), dtype=torch.float64)
    merged = merge_posteriors(base, sources, weights)
    elsewhere = merge_posteriors(Diagonal(base.mean, base.precision * 1e6), sources, weights)
    assert torch.equal(merged.mean, elsewhere.mean)
    assert torch.equal(merged.precision_tensor(), elsewhere.precision_tensor())
    moved = merge_posteriors(Diagonal(base.mean + 3, base.precision), sources, weights)
    torch.testing.assert_close(moved.mean, merged.mean, rtol=0, atol=1e-14)


def test_removal_of_a_source_leaves_the_others() -> None:
    base, sources = _draw(5)
    both = merge_posteriors(base, sources[:2], torch.ones(2, dtype=torch.float64)).check()
    left = merge_posteriors(base, [both, sources[1]], torch.tensor((1.0, -1.0), dtype=torch.float64))
    _assert_same(left, sources[0])


def test_removing_more_than_was_learned_is_visible_and_a_floor_mends_it() -> None:
    base, sources = _draw(6)
    weights = torch.tensor((0.1, 0.1, -9.0), dtype=torch.float64)
    with pytest.raises(NonPositivePrecisionError, match="of 35 entries"):
        merge_posteriors(base, sources, weights).check()
    merged = merge_posteriors(base, sources, weights, floor=0.125).check()
    assert merged.precision_tensor().min() == 0.125


def test_the_richest_family_decides() -> None:
    base, sources = _draw(7)
    isotropic, weights = Isotropic(base.mean, 1.0), torch.tensor((1.0, 1.0), dtype=torch.float64)
    assert type(merge_posteriors(isotropic, [isotropic, isotropic], weights)) is Isotropic
    assert type(merge_posteriors(isotropic, [isotropic, sources[0]], weights)) is Diagonal
    assert type(merge_posteriors(base, [isotropic, isotropic], weights)) is Diagonal
    assert type(merge_posteriors(base, [isotropic, Other(base.mean)], weights)) is Other
    assert type(merge_posteriors(Other(base.mean), sources[:2], weights)) is Other


def test_the_entrywise_rule_refuses_other_families() -> None:
    base, _ = _draw(8)
    for everyone in ((base, [Other(base.mean)]), (Other(base.mean), [base])):
        with pytest.raises(MethodError, match="`other` posterior"):
            Diagonal.merge(*everyone, torch.ones(1, dtype=torch.float64))


def test_weights_of_higher_precision_are_summed_before_rounding() -> None:
    """0.1 + 0.2 + 0.7 is one in float64 and not in float32; only then does a huge prior drop out."""
    base, sources = _draw(9)
    huge = Isotropic(base.mean.float(), 1e9)
    single = [Diagonal(source.mean.float(), source.precision.float()) for source in sources]
    weights = torch.tensor((0.1, 0.2, 0.7), dtype=torch.float64)
    assert weights.sum() == 1
    merged = merge_posteriors(huge, single, weights)
    wanted = merge_posteriors(base, sources, weights)
    torch.testing.assert_close(merged.precision_tensor().double(), wanted.precision_tensor(), rtol=1e-6, atol=0)
    assert merged.mean.dtype == torch.float32


@pytest.mark.parametrize("weights", [(), (1.0,), (1.0, 1.0, 1.0, 1.0), ((1.0, 1.0, 1.0),)])
def test_there_is_one_weight_per_source(weights: tuple[float, ...]) -> None:
    base, sources = _draw(10)
    with pytest.raises(MethodError, match="3 sources with weights of shape"):
        merge_posteriors(base, sources, torch.tensor(weights, dtype=torch.float64))


def test_there_is_at_least_one_source() -> None:
    base, _ = _draw(11)
    with pytest.raises(MethodError, match="0 sources"):
        merge_posteriors(base, [], torch.empty(0))
    with pytest.raises(ValueError, match="at least one posterior"):
        richest([])


def test_nothing_is_broadcast() -> None:
    base, sources = _draw(12)
    row = Diagonal(sources[0].mean[0], sources[0].precision[0])
    with pytest.raises(ShapeMismatchError, match=r"\(5, 7\) .* \(7,\)"):
        merge_posteriors(base, [sources[0], row], torch.ones(2, dtype=torch.float64))
