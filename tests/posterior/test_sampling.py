"""Samples have the moments of the posterior they come from."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.errors import NumericalError
from mergekit_bayes.posterior import Diagonal, Isotropic
from mergekit_bayes.posterior.elementwise import Elementwise

COUNT = 200_000


def _posterior(family: str) -> Elementwise:
    mean = torch.linspace(-2, 2, COUNT, dtype=torch.float64)
    if family == "isotropic":
        return Isotropic(mean, 4.0)
    return Diagonal(mean, torch.linspace(0.5, 8, COUNT, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("family", ["isotropic", "diagonal"])
def test_standardised_samples_have_standard_moments(family: str, temperature: float) -> None:
    posterior = _posterior(family)
    sample = posterior.sample(torch.Generator().manual_seed(1), temperature=temperature)
    standard = (sample - posterior.mean) * (posterior.precision / temperature).sqrt()
    # standard errors of the first four moments of a normal are 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n
    for moment, wanted, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((standard**moment).mean().item() - wanted) < 5 * spread / COUNT**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_has_shape_and_dtype_of_the_mean_and_repeats_with_the_seed(dtype: torch.dtype) -> None:
    posterior = Isotropic(torch.ones(3, 5, dtype=dtype), 2.0)
    first, again = (posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (3, 5)
    assert first.dtype == dtype
    assert torch.equal(first, again)
    assert not torch.equal(first, posterior.sample(torch.Generator().manual_seed(8)))


def test_without_a_generator_torch_decides() -> None:
    posterior = Isotropic(torch.ones(5), 2.0)
    torch.manual_seed(3)
    first = posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(first, posterior.sample())


def test_temperature_zero_is_the_mean() -> None:
    posterior = _posterior("diagonal")
    sample = posterior.sample(temperature=0.0)
    assert torch.equal(sample, posterior.mean)
    assert sample.data_ptr() != posterior.mean.data_ptr()


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_other_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(NumericalError, match="finite and at least 0"):
        _posterior("isotropic").sample(temperature=temperature)
