"""Product, quotient, power, density and divergence obey the laws of Gaussians."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mergekit_bayes.errors import MethodError, NonPositivePrecisionError, ShapeMismatchError
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior
from mergekit_bayes.posterior.elementwise import Elementwise
from tests.posterior.other_family import Other

ENTRIES = 3


@st.composite
def posteriors(draw: st.DrawFn) -> Elementwise:
    """Means up to 1000 and precisions between 1e-3 and 1e3, in both families."""
    numbers = st.floats(-1e3, 1e3, allow_subnormal=False)
    exponents = st.floats(-3, 3)
    mean = torch.tensor(draw(st.lists(numbers, min_size=ENTRIES, max_size=ENTRIES)), dtype=torch.float64)
    if draw(st.booleans()):
        return Isotropic(mean, 10 ** draw(exponents))
    logs = draw(st.lists(exponents, min_size=ENTRIES, max_size=ENTRIES))
    return Diagonal(mean, 10 ** torch.tensor(logs, dtype=torch.float64))


points = st.lists(st.floats(-100, 100), min_size=ENTRIES, max_size=ENTRIES).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def _close(seen: Posterior, wanted: Posterior, *, tolerance: float = 1e-9) -> None:
    left, right = seen.precision_tensor(), wanted.precision_tensor()
    torch.testing.assert_close(left.expand_as(seen.mean), right.expand_as(seen.mean), rtol=tolerance, atol=0)
    torch.testing.assert_close(seen.mean, wanted.mean, rtol=tolerance, atol=1e3 * tolerance)


def _torch(posterior: Elementwise) -> Normal:
    return Normal(posterior.mean, posterior.precision.expand_as(posterior.mean).rsqrt())


@given(posteriors(), posteriors())
def test_a_product_does_not_depend_on_the_order(q: Posterior, p: Posterior) -> None:
    _close(q.product(p), p.product(q))


@given(posteriors(), posteriors(), posteriors())
def test_a_product_does_not_depend_on_the_grouping(q: Posterior, p: Posterior, r: Posterior) -> None:
    _close(q.product(p).product(r), q.product(p.product(r)))


@given(posteriors(), posteriors())
def test_a_quotient_undoes_a_product(q: Posterior, p: Posterior) -> None:
    _close(q.product(p).quotient(p), q, tolerance=1e-8)


@given(posteriors(), st.floats(0.1, 10), st.floats(0.1, 10))
def test_powers_add_up(q: Posterior, alpha: float, beta: float) -> None:
    _close(q.power(alpha).product(q.power(beta)), q.power(alpha + beta))
    _close(q.power(alpha + beta).quotient(q.power(beta)), q.power(alpha))


@given(posteriors(), posteriors(), st.floats(0.1, 10), points, points)
def test_densities_multiply_up_to_a_constant(q: Posterior, p: Posterior, alpha: float, x: Tensor, y: Tensor) -> None:
    def contrast(posterior: Posterior) -> Tensor:
        return posterior.log_density(x) - posterior.log_density(y)

    room = {"rtol": 1e-8, "atol": 1e-8 * float(contrast(q).abs() + contrast(p).abs() + 1)}
    torch.testing.assert_close(contrast(q.product(p)), contrast(q) + contrast(p), **room)
    torch.testing.assert_close(contrast(q.power(alpha)), alpha * contrast(q), **room)


@given(posteriors(), points)
def test_log_density_is_that_of_independent_normals(q: Elementwise, x: Tensor) -> None:
    torch.testing.assert_close(q.log_density(x), _torch(q).log_prob(x).sum(), rtol=1e-10, atol=1e-10)


@given(posteriors(), posteriors())
def test_kl_is_that_of_independent_normals(q: Elementwise, p: Elementwise) -> None:
    wanted = kl_divergence(_torch(q), _torch(p)).sum()
    torch.testing.assert_close(q.kl(p), wanted, rtol=1e-8, atol=1e-8)


@given(posteriors(), posteriors())
def test_kl_is_zero_for_equal_posteriors_and_positive_for_others(q: Posterior, p: Posterior) -> None:
    assert q.kl(q).item() == 0
    assert q.kl(p).item() >= 0
    assert q.kl(q.with_mean(q.mean + 1e-3)).item() > 0
    assert q.kl(q.power(1.001)).item() > 0


@pytest.mark.parametrize("exponent", [-30, -10, -8, -4, -2, -1, 0, 1, 2, 4, 8, 30])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_is_accurate_near_and_far_from_equality(dtype: torch.dtype, scale: float, exponent: int) -> None:
    """Precisions in the ratio 1 + 2^e or 2^e, against the series or the direct formula in float64."""
    mean = torch.zeros(1, dtype=dtype)
    for factor in (1 + 2.0**exponent, 2.0**exponent):
        q, p = Isotropic(mean, scale), Isotropic(mean, scale * factor)
        excess = (p.precision.item() - q.precision.item()) / q.precision.item()
        if abs(excess) < 1e-3:
            wanted = sum((-1) ** n * excess**n / n for n in range(2, 8)) / 2
        else:
            wanted = (excess - math.log1p(excess)) / 2
        # x - log(1 + x) cannot be known better than to one rounding of its parts
        room = 4 * torch.finfo(dtype).eps * max(abs(excess), abs(math.log1p(excess)))
        if abs(excess) >= 0.499:
            room += 4 * torch.finfo(dtype).eps * abs(math.log(scale))
        assert q.kl(p).item() == pytest.approx(wanted, rel=1e-5, abs=room)


def test_two_isotropic_posteriors_stay_isotropic_and_a_diagonal_one_wins() -> None:
    mean = torch.ones(4)
    isotropic, diagonal = Isotropic(mean, 4.0), Diagonal(mean, torch.full((4,), 2.0))
    assert type(isotropic.product(isotropic)) is Isotropic
    assert type(isotropic.power(2)) is Isotropic
    assert type(isotropic.product(diagonal)) is Diagonal
    assert type(diagonal.product(isotropic)) is Diagonal
    assert type(isotropic.quotient(diagonal)) is Diagonal
    assert type(diagonal.power(0.5)) is Diagonal


@pytest.mark.parametrize("precision", [2.0, 3.0])
def test_a_quotient_by_something_sharper_is_refused(precision: float) -> None:
    mean = torch.zeros(4)
    with pytest.raises(NonPositivePrecisionError, match="4 of 4 entries"):
        Diagonal(mean, torch.full((4,), 2.0)).quotient(Isotropic(mean + 1, precision))


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_only_positive_powers_exist(alpha: float) -> None:
    with pytest.raises(NonPositivePrecisionError):
        Isotropic(torch.zeros(2), 1.0).power(alpha)


def test_close_means_far_from_zero_lose_nothing() -> None:
    """If S m were formed and divided again, float32 would keep three digits of the difference."""
    mean = torch.full((1000,), 1000.0)
    nearby = mean + torch.linspace(0, 1, 1000)
    q, p = Diagonal(mean, torch.rand(1000) + 0.5), Diagonal(nearby, torch.rand(1000) + 0.5)
    share = p.precision.double() / (p.precision.double() + q.precision.double())
    wanted = mean.double() + share * (nearby.double() - mean.double())
    assert (q.product(p).mean.double() - wanted).abs().max() <= 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("operation", ["product", "quotient", "kl"])
def test_posteriors_of_different_tensors_do_not_mix(operation: str) -> None:
    q = Diagonal(torch.ones(2, 3), torch.ones(2, 3))
    for other in (Diagonal(torch.ones(3), torch.ones(3)), Isotropic(torch.ones(2, 3).double(), 1.0)):
        with pytest.raises(ShapeMismatchError, match=r"\(2, 3\) torch\.float32 on cpu and"):
            getattr(q, operation)(other)


@pytest.mark.parametrize("operation", ["product", "quotient", "kl"])
def test_a_family_without_entrywise_precision_is_refused(operation: str) -> None:
    with pytest.raises(MethodError, match="`other` posterior cannot be combined entry by entry"):
        getattr(Isotropic(torch.ones(3), 1.0), operation)(Other(torch.ones(3)))


def test_the_density_of_a_point_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeMismatchError, match=r"x has shape \(3,\), the mean \(2, 3\)"):
        Isotropic(torch.ones(2, 3), 1.0).log_density(torch.ones(3))
