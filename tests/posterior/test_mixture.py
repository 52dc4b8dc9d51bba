"""Mixtures: the algebra that is closed for them, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from mergekit_bayes.errors import (
    MethodError,
    NonPositivePrecisionError,
    NumericalError,
    ShapeMismatchError,
)
from mergekit_bayes.posterior import Diagonal, Isotropic, Mixture, mismatch
from tests.posterior.kronecker_problem import Draw, numbers

WEIGHTS = (0.5, 0.3, 0.2)


def _mixture(seed: int = 0, shape: tuple[int, int] = (2, 3), *, spread: float = 1.0) -> Mixture:
    draw = Draw(seed, shape=shape)
    parts = [Diagonal(spread * draw.normal(*shape), 1 + draw.normal(*shape).square()) for _ in WEIGHTS]
    return Mixture(parts, [math.log(weight) for weight in WEIGHTS])


def _torch(mixture: Mixture) -> MixtureSameFamily:
    means = torch.stack([part.mean for part in mixture.components])
    deviations = torch.stack([part.precision_tensor().rsqrt() for part in mixture.components])
    weights = Categorical(logits=torch.tensor(mixture.log_weights, dtype=torch.float64))
    return MixtureSameFamily(weights, Independent(Normal(means, deviations), 2))


def test_weights_are_normalised_and_alike_by_default() -> None:
    parts = _mixture().components
    assert Mixture(parts).log_weights == pytest.approx([math.log(1 / 3)] * 3)
    assert Mixture(parts, [math.log(5), math.log(3), math.log(2)]).log_weights == pytest.approx(
        [math.log(weight) for weight in WEIGHTS]
    )


def test_mean_and_density_are_those_of_the_mixture() -> None:
    mixture, x = _mixture(), Draw(1).normal(2, 3)
    torch.testing.assert_close(mixture.mean, _torch(mixture).mean)
    torch.testing.assert_close(mixture.log_density(x), _torch(mixture).log_prob(x))
    wanted = sum(w * part.precision_tensor() for w, part in zip(WEIGHTS, mixture.components, strict=True))
    torch.testing.assert_close(mixture.precision_tensor(), wanted)
    torch.testing.assert_close(mixture.quadratic(x), (wanted * x.square()).sum())
    moved = mixture.with_mean(x)
    torch.testing.assert_close(moved.mean, x)
    torch.testing.assert_close(moved.log_density(x), mixture.log_density(mixture.mean))


@pytest.mark.parametrize("other", ["isotropic", "diagonal", "kronecker", "mixture"])
def test_products_multiply_densities_and_quotients_divide_them(other: str) -> None:
    q, draw = _mixture(2), Draw(3, shape=(2, 3))
    p = {
        "isotropic": lambda: draw.prior(0.2),
        "diagonal": lambda: Diagonal(draw.normal(2, 3), 0.1 + 0.1 * draw.normal(2, 3).square()),
        "kronecker": lambda: draw.posterior("plain"),
        "mixture": lambda: _mixture(4),
    }[other]()
    x, y = draw.normal(2, 3), draw.normal(2, 3)

    def contrast(posterior: object) -> float:
        return float(posterior.log_density(x) - posterior.log_density(y))  # type: ignore[attr-defined]

    for product in (q.product(p), p.product(q)):
        assert contrast(product) == pytest.approx(contrast(q) + contrast(p), rel=1e-9)
    if other == "mixture":
        with pytest.raises(MethodError, match="quotient by a mixture"):
            q.quotient(p)
    else:
        undone = q.product(p).quotient(p)
        assert contrast(undone) == pytest.approx(contrast(q), rel=1e-8)
        np.testing.assert_allclose(undone.log_weights, q.log_weights, atol=1e-8)


def test_one_component_behaves_as_that_component() -> None:
    draw = Draw(5)
    part, other = draw.diagonal(), draw.posterior("plain")
    single = Mixture([part])
    x = draw.normal(4, 6)
    assert single.mean is part.mean
    assert single.log_density(x) == part.log_density(x)
    assert single.kl(other) == part.kl(other)
    assert other.kl(single) == other.kl(part)
    assert torch.equal(single.power(0.5).precision_tensor(), part.precision_tensor() * 0.5)
    assert mismatch(x, single, draw.prior()) == mismatch(x, part, Draw(5).prior())


def test_what_is_no_mixture_is_refused() -> None:
    q = _mixture(6)
    assert q.power(1.0) is q
    with pytest.raises(MethodError, match="power of a mixture"):
        q.power(0.5)
    with pytest.raises(NonPositivePrecisionError):
        q.power(-1.0)
    with pytest.raises(MethodError, match="average log_density over samples"):
        q.kl(_mixture(7))
    with pytest.raises(NonPositivePrecisionError):
        q.quotient(Isotropic(q.mean, 50.0))


def test_samples_come_from_every_component_in_its_share() -> None:
    mixture = _mixture(8, spread=100.0)
    generator = torch.Generator().manual_seed(0)
    samples = [mixture.sample(generator) for _ in range(2000)]
    nearest = [
        min(range(3), key=lambda k, x=x: float((x - mixture.components[k].mean).norm()))
        for x in samples  # type: ignore[misc]
    ]
    shares = np.bincount(nearest, minlength=3) / len(samples)
    np.testing.assert_allclose(shares, WEIGHTS, atol=0.05)
    again = mixture.sample(torch.Generator().manual_seed(0))
    assert torch.equal(again, samples[0])
    still = mixture.sample(generator, temperature=0.0)
    assert any(torch.equal(still, part.mean) for part in mixture.components)
    with pytest.raises(NumericalError, match="temperature"):
        mixture.sample(temperature=float("nan"))


def test_responsibilities_are_tempered_densities() -> None:
    mixture, x = _mixture(9), Draw(10).normal(2, 3)
    densities = np.array([float(part.log_density(x)) for part in mixture.components])
    for temperature in (0.5, 1.0, 6.0, 1e9):
        wanted = np.array(WEIGHTS) * np.exp(densities / temperature)
        seen = mixture.responsibilities(x, temperature=temperature)
        np.testing.assert_allclose(seen, wanted / wanted.sum(), rtol=1e-10)


def test_the_mismatch_is_shared_out_by_responsibility() -> None:
    mixture, x = _mixture(11), Draw(12).normal(2, 3)
    base = Isotropic(Draw(13).normal(2, 3), 0.3)
    parts = [float(mismatch(x, part, base)) for part in mixture.components]
    shares = mixture.responsibilities(x, temperature=6.0)
    assert float(mismatch(x, mixture, base)) == pytest.approx(np.dot(parts, shares), rel=1e-12)


def test_illegal_mixtures_cannot_be_built() -> None:
    parts = _mixture().components
    for wrong in ([], [0.0, 0.0], [0.0, 0.0, float("-inf")]):
        with pytest.raises(MethodError, match="one finite number each"):
            Mixture(parts, wrong)
    with pytest.raises(MethodError, match="0 components"):
        Mixture([])
    with pytest.raises(MethodError, match="give its components instead"):
        Mixture([Mixture(parts)])
    with pytest.raises(ShapeMismatchError, match="different tensors"):
        Mixture([parts[0], Diagonal(parts[0].mean[0], parts[0].precision_tensor()[0])])
    with pytest.raises(NonPositivePrecisionError):
        Mixture([Diagonal.unchecked(parts[0].mean, -parts[0].precision_tensor())])
    assert repr(Mixture(parts)) == "Mixture(3 of Diagonal(shape=(2, 3), dtype=torch.float64))"
    assert numbers(Mixture.unchecked(parts).check().mean).shape == (2, 3)
