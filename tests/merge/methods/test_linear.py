"""Linear: weights are normalised as mergekit does."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.errors import MethodError
from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.posterior import Isotropic

LINEAR = get_method("linear")


@pytest.mark.parametrize(
    ("weights", "normalize", "effective"),
    [
        ((1, 3), True, (0.25, 0.75)),
        ((1, 3), False, (1.0, 3.0)),
        ((-2, 4), True, (-1.0, 2.0)),
        ((-1, -3), True, (0.25, 0.75)),
        ((0.5, 0), True, (1.0, 0.0)),
        ((1, -1), False, (1.0, -1.0)),
        ((0, 0), False, (0.0, 0.0)),
    ],
)
def test_effective_weights(weights: tuple[float, ...], normalize: bool, effective: tuple[float, ...]) -> None:
    assert LINEAR.effective_weights(weights, {"normalize": normalize}) == effective


def test_weights_are_normalised_by_default() -> None:
    assert LINEAR.effective_weights((2, 2), {}) == (0.5, 0.5)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.1, 0.2, -0.3)])
def test_a_zero_sum_has_no_average(weights: tuple[float, ...]) -> None:
    with pytest.raises(MethodError, match=r"sum to zero and cannot be normalized; set `normalize: false`"):
        LINEAR.effective_weights(weights, {})


def test_a_small_sum_is_still_a_sum() -> None:
    assert LINEAR.effective_weights((1e-9, 1e-9), {}) == (0.5, 0.5)


def test_many_sources_and_any_weights() -> None:
    means = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.linspace(-1, 2, 40, dtype=torch.float64)
    merged = LINEAR.kernel(Isotropic(means[0], 2.0), [Isotropic(each, 1.0) for each in means], weights)
    torch.testing.assert_close(merged.mean, weights @ means, rtol=0, atol=1e-13)
    assert merged.precision_tensor() == 2
