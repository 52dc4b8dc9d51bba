"""LoRA arithmetic against brute force, Monte Carlo and dense linear algebra."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mergekit_bayes.merge import lora
from mergekit_bayes.merge.lora import Factors


def _factors(
    seed: int, rows: int = 7, columns: int = 9, rank: int = 3, *, dtype: torch.dtype = torch.float64
) -> Factors:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=g, dtype=dtype)
    b = torch.randn(rows, rank, generator=g, dtype=dtype)
    variance_a = torch.rand(rank, columns, generator=g, dtype=dtype) + 0.05
    variance_b = torch.rand(rows, rank, generator=g, dtype=dtype) + 0.05
    return Factors(a, b, variance_a, variance_b)


def test_the_variance_of_the_product_is_the_sum_over_ranks_entry_by_entry() -> None:
    f = _factors(0)
    assert f.variance_a is not None
    assert f.variance_b is not None
    expected = torch.zeros(7, 9, dtype=torch.float64)
    for i in range(7):
        for j in range(9):
            for k in range(3):
                va, vb = float(f.variance_a[k, j]), float(f.variance_b[i, k])
                expected[i, j] += float(f.b[i, k]) ** 2 * va + float(f.a[k, j]) ** 2 * vb + va * vb
    torch.testing.assert_close(lora.product_variance(f, slice(None)), expected, rtol=1e-13, atol=0)


def test_the_variance_of_the_product_is_what_sampling_the_factors_gives() -> None:
    f = _factors(1, rows=3, columns=4, rank=2)
    assert f.variance_a is not None
    assert f.variance_b is not None
    g = torch.Generator().manual_seed(2)
    draws = 200_000
    a = f.a + f.variance_a.sqrt() * torch.randn(draws, *f.a.shape, generator=g, dtype=torch.float64)
    b = f.b + f.variance_b.sqrt() * torch.randn(draws, *f.b.shape, generator=g, dtype=torch.float64)
    products = b @ a
    torch.testing.assert_close(products.mean(0), lora.product_mean(f, slice(None)), rtol=0, atol=0.03)
    torch.testing.assert_close(products.var(0), lora.product_variance(f, slice(None)), rtol=0.03, atol=0)


def test_rows_of_mean_and_variance_are_those_of_the_whole() -> None:
    f, rows = _factors(3), slice(2, 5)
    torch.testing.assert_close(lora.product_mean(f, rows), (f.b @ f.a)[rows])
    torch.testing.assert_close(lora.product_variance(f, rows), lora.product_variance(f, slice(None))[rows])


def test_factors_without_variances_have_no_product_variance() -> None:
    f = _factors(4)
    with pytest.raises(ValueError, match="no variances"):
        lora.product_variance(Factors(f.a, f.b), slice(None))


def test_what_data_add_to_the_precision_of_the_product_is_never_negative_and_leaves_the_prior_out() -> None:
    f = _factors(5)
    assert f.variance_a is not None
    assert f.variance_b is not None
    prior = (1.06, 1.07)  # every variance above is smaller
    informed = lora.product_precision(f._replace(prior_variance=prior), slice(None))
    uninformed = Factors(f.a, f.b, torch.full_like(f.a, prior[0]), torch.full_like(f.b, prior[1]))
    expected = 1 / lora.product_variance(f, slice(None)) - 1 / lora.product_variance(uninformed, slice(None))
    torch.testing.assert_close(informed, expected, rtol=1e-12, atol=0)
    assert bool((informed > 0).all())
    nothing = lora.product_precision(uninformed._replace(prior_variance=prior), slice(1, 3))
    torch.testing.assert_close(nothing, torch.zeros(2, 9, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(lora.product_precision(f, slice(2, 4)), 1 / lora.product_variance(f, slice(2, 4)))


def test_a_stack_is_the_exact_weighted_sum_whatever_the_ranks_and_signs() -> None:
    updates = [_factors(5, rank=2), _factors(6, rank=4), _factors(7, rank=1)]
    wanted = [0.3, -1.5, 2.0]
    stacked = lora.stack(updates, wanted)
    expected = sum((c * (u.b @ u.a) for c, u in zip(wanted, updates, strict=True)), torch.zeros(7, 9).double())
    assert stacked.a.shape == (7, 9)
    torch.testing.assert_close(stacked.b @ stacked.a, expected, rtol=1e-13, atol=1e-13)


def test_the_relative_difference_is_that_of_the_dense_products() -> None:
    first, second = _factors(11, rank=2), _factors(12, rank=5)
    dense = torch.linalg.norm(first.b @ first.a - second.b @ second.a) / torch.linalg.norm(second.b @ second.a)
    assert lora.relative_difference(first, second) == pytest.approx(float(dense), rel=1e-10)


def test_the_relative_difference_to_nothing_is_zero_or_infinite() -> None:
    zero = Factors(torch.zeros(2, 9).double(), torch.zeros(7, 2).double())
    assert lora.relative_difference(zero, zero) == 0.0
    assert math.isinf(lora.relative_difference(_factors(13), zero))


def test_averaging_the_factors_of_independent_adapters_has_the_known_cross_terms() -> None:
    updates = [_factors(20 + t, rows=200, columns=200, rank=16) for t in range(4)]
    mean = Factors(sum(u.a for u in updates) / 4, sum(u.b for u in updates) / 4)  # type: ignore[arg-type]
    exact = lora.stack(updates, [0.25] * 4)
    # Plain averaging of both factors of T independent adapters: sqrt(1 - 1/T) of the exact mean, mostly shrinkage.
    assert lora.relative_difference(mean, exact) == pytest.approx(math.sqrt(1 - 1 / 4), rel=0.05)


def _propagated(a: torch.Tensor, b: torch.Tensor, variances: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return lora.product_variance(Factors(a, b, *variances), slice(None))


def test_fitted_factor_variances_reproduce_a_variance_that_came_from_factors() -> None:
    f = _factors(14, rows=30, columns=40, rank=3)
    target = lora.product_variance(f, slice(None))
    variances, misfit = lora.fit_factor_variances(f.a, f.b, target, iterations=300)
    assert misfit < 0.01
    assert all(bool((variance > 0).all()) for variance in variances)
    found = _propagated(f.a, f.b, variances)
    torch.testing.assert_close(found, target, rtol=0.2, atol=0)
    assert misfit == pytest.approx(float((found - target).abs().sum() / target.sum()), rel=1e-9)


def test_every_sweep_of_the_fit_lowers_the_divergence() -> None:
    g = torch.Generator().manual_seed(15)
    f = _factors(16, rows=12, columns=10)
    target = torch.rand(12, 10, generator=g, dtype=torch.float64) + 0.01
    divergences = []
    for sweeps in range(8):
        found = _propagated(f.a, f.b, lora.fit_factor_variances(f.a, f.b, target, iterations=sweeps)[0])
        divergences.append(float((target * (target / found).log() - target + found).sum()))
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(divergences))
    assert divergences[-1] < divergences[0]


def test_the_fit_does_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    f = _factors(18, rows=11, columns=6)
    target = lora.product_variance(_factors(19, rows=11, columns=6), slice(None))
    whole, misfit = lora.fit_factor_variances(f.a, f.b, target)
    monkeypatch.setattr(lora, "ROWS_ELEMENTS", 13)
    assert len(list(lora.row_blocks(target.shape))) == 6
    cut, same = lora.fit_factor_variances(f.a, f.b, target)
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=0)
    assert same == pytest.approx(misfit, rel=1e-9)


@pytest.mark.parametrize("vanishing", ["a direction", "everything"])
@pytest.mark.parametrize("size", [1e-12, 0.3, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fit_survives_directions_that_carry_nothing(vanishing: str, size: float, dtype: torch.dtype) -> None:
    f = _factors(17, dtype=dtype)
    gone = slice(1, 2) if vanishing == "a direction" else slice(None)
    a, b = f.a.clone(), f.b.clone()
    a[gone], b[:, gone] = 0.0, 0.0
    target = torch.full((7, 9), size, dtype=dtype)
    variances, misfit = lora.fit_factor_variances(a, b, target)
    assert misfit < (0.4 if vanishing == "a direction" else 1e-3)
    for variance in variances:
        assert bool(torch.isfinite(variance.reciprocal()).all())
        assert bool((variance > 0).all())
    if vanishing == "everything":
        # Nothing tells the factors apart, so neither is far more certain than the other.
        assert 0.1 < float(variances[0].mean() / variances[1].mean()) < 10


def test_variances_stay_numbers_where_the_target_leaves_them_no_room() -> None:
    """An entry of dW that is certain while its factors are not drives their variances towards zero, sweep by sweep."""
    f = _factors(20, rows=6, columns=5, dtype=torch.float32)
    target = torch.full((6, 5), 1e-30)
    target[0, 0] = 1.0
    variances, _ = lora.fit_factor_variances(f.a, f.b, target, iterations=400)
    assert all(bool(torch.isfinite(variance.reciprocal()).all()) for variance in variances)
