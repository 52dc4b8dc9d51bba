"""Hessian weighting: no base, no normalisation, and a floor that favours no source."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.errors import MethodError
from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.posterior import Diagonal, Isotropic

HESSIAN_WEIGHTED = get_method("hessian_weighted")
BASE = Isotropic(torch.zeros(4, dtype=torch.float64), 1.0)


def _sources(*pairs: tuple[float, float]) -> list[Diagonal]:
    return [
        Diagonal(torch.full((4,), m, dtype=torch.float64), torch.full((4,), s, dtype=torch.float64)) for m, s in pairs
    ]


def test_weights_scale_the_precision_and_not_the_mean() -> None:
    sources = _sources((0.0, 1.0), (1.0, 3.0))
    once, thrice = (
        HESSIAN_WEIGHTED.kernel(BASE, sources, torch.full((2,), factor, dtype=torch.float64)) for factor in (1, 3)
    )
    torch.testing.assert_close(once.mean, torch.full((4,), 0.75, dtype=torch.float64))
    torch.testing.assert_close(thrice.mean, once.mean)
    torch.testing.assert_close(once.precision_tensor(), torch.full((4,), 4.0, dtype=torch.float64))
    torch.testing.assert_close(thrice.precision_tensor(), 3 * once.precision_tensor())


def test_weights_are_kept_unless_all_are_zero() -> None:
    assert HESSIAN_WEIGHTED.effective_weights((2.0, 0.0, -1.0), {}) == (2.0, 0.0, -1.0)
    with pytest.raises(MethodError, match="all weights are zero"):
        HESSIAN_WEIGHTED.effective_weights((0.0, 0.0), {})


def test_below_the_floor_the_missing_precision_lies_on_the_plain_average() -> None:
    """0.2 and 0.3 are known of two sources; a floor of 1 puts the missing 0.5 on their average, 2."""
    merged = HESSIAN_WEIGHTED.kernel(
        BASE, _sources((1.0, 0.2), (3.0, 0.3)), torch.ones(2, dtype=torch.float64), floor=1.0
    )
    torch.testing.assert_close(merged.mean, torch.full((4,), 0.2 * 1 + 0.3 * 3 + 0.5 * 2, dtype=torch.float64))
    assert (merged.precision_tensor() == 1).all()


def test_above_the_floor_nothing_changes() -> None:
    sources = _sources((1.0, 2.0), (3.0, 5.0))
    weights = torch.tensor((0.6, 0.4), dtype=torch.float64)
    free, floored = (HESSIAN_WEIGHTED.kernel(BASE, sources, weights, floor=floor) for floor in (None, 1e-3))
    torch.testing.assert_close(floored.mean, free.mean)
    assert torch.equal(floored.precision_tensor(), free.precision_tensor())


def test_rounding_happens_at_the_size_of_the_differences() -> None:
    """A removal that leaves little precision: weights of 1000, differences of 1e-3, float32."""
    first = torch.full((4,), 1000.0)
    second = first + 2.0**-10
    sources = [Diagonal(first, torch.full((4,), 1.0)), Diagonal(second, torch.full((4,), 0.99))]
    merged = HESSIAN_WEIGHTED.kernel(Isotropic(first, 1.0), sources, torch.tensor((1.0, -1.0)))
    exact = 1000 - 0.99 / (1 - 0.99) * 2.0**-10
    torch.testing.assert_close(merged.mean, torch.full((4,), exact), rtol=0, atol=2e-4)
