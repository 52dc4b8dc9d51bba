"""A posterior that exists is a posterior: illegal values, shapes and dtypes are refused when it is built."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from mergekit_bayes.errors import (
    NonFiniteError,
    NonPositivePrecisionError,
    NumericalError,
    ShapeMismatchError,
)
from mergekit_bayes.posterior import Diagonal, Isotropic

INF, NAN = float("inf"), float("nan")
MEAN = torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0]])


def _spoiled(value: float) -> torch.Tensor:
    tensor = torch.ones(2, 3)
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize("precision", [3, 3.0, torch.tensor(3.0)])
def test_an_isotropic_precision_may_be_a_number(precision: float | torch.Tensor) -> None:
    posterior = Isotropic(MEAN, precision)
    assert posterior.precision.shape == ()
    assert posterior.precision.dtype == MEAN.dtype
    assert posterior.precision.item() == 3


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_mean_is_finite(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"diagonal mean: 1 of 6 entries \(0\.167\)"):
        Diagonal(_spoiled(value), torch.ones(2, 3))
    with pytest.raises(NonFiniteError, match="isotropic mean: 1 of 6 entries"):
        Isotropic(_spoiled(value), 1.0)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_a_precision_is_finite(value: float) -> None:
    with pytest.raises(NonFiniteError, match="diagonal precision: 1 of 6 entries"):
        Diagonal(MEAN, _spoiled(value))
    with pytest.raises(NonFiniteError, match="isotropic precision: 1 of 1 entries"):
        Isotropic(MEAN, value)


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (-0.5, "-0.5")])
def test_a_precision_is_positive(value: float, shown: str) -> None:
    with pytest.raises(NonPositivePrecisionError, match=rf"1 of 6 entries .* the lowest is {shown};"):
        Diagonal(MEAN, _spoiled(value))
    with pytest.raises(NonPositivePrecisionError, match=rf"1 of 1 entries .* the lowest is {shown};"):
        Isotropic(MEAN, value)


def test_the_smallest_positive_precision_is_legal() -> None:
    Diagonal(torch.zeros(3), torch.full((3,), torch.finfo(torch.float32).tiny))


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (1, 3)])
def test_a_diagonal_precision_has_the_shape_of_the_mean(shape: tuple[int, ...]) -> None:
    for build in (Diagonal, Diagonal.unchecked):
        with pytest.raises(ShapeMismatchError, match=r"mean of shape \(2, 3\), precision"):
            build(MEAN, torch.ones(shape))


def test_an_isotropic_precision_is_one_number() -> None:
    for build in (Isotropic, Isotropic.unchecked):
        with pytest.raises(ShapeMismatchError, match=r"shape \(1,\), not one number"):
            build(MEAN, torch.ones(1))


def test_mean_and_precision_agree_in_dtype_and_device() -> None:
    for build in (Diagonal, Diagonal.unchecked):
        with pytest.raises(ShapeMismatchError, match=r"torch\.float32 on cpu, precision torch\.float64"):
            build(MEAN, torch.ones(2, 3, dtype=torch.float64))
        with pytest.raises(ShapeMismatchError, match=r"torch\.float32 on meta"):
            build(MEAN, torch.ones(2, 3, device="meta"))


def test_a_mean_is_floating_point() -> None:
    with pytest.raises(NumericalError, match=r"torch\.int64; it must be floating point"):
        Isotropic(torch.tensor([1, 2]), torch.tensor(1))


def test_an_empty_tensor_has_a_posterior() -> None:
    empty = torch.empty(0, 4)
    assert Diagonal(empty, empty).sample().shape == (0, 4)
    assert Isotropic(empty, 2.0).kl(Isotropic(empty, 3.0)).item() == 0


def test_unchecked_takes_any_value_and_check_finds_it() -> None:
    posterior = Diagonal.unchecked(MEAN, -torch.ones(2, 3))
    with pytest.raises(NonPositivePrecisionError, match="6 of 6"):
        posterior.check()
    sound = Diagonal.unchecked(MEAN, torch.ones(2, 3))
    assert sound.check() is sound


def test_a_posterior_cannot_be_changed() -> None:
    posterior = Isotropic(MEAN, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        posterior.mean = MEAN  # type: ignore[misc]


def test_with_mean_keeps_the_precision() -> None:
    for posterior in (Isotropic(MEAN, 2.0), Diagonal(MEAN, MEAN.square() + 1)):
        moved = posterior.with_mean(MEAN + 1)
        assert type(moved) is type(posterior)
        assert moved.precision is posterior.precision
        assert torch.equal(moved.mean, MEAN + 1)


def test_repr_is_one_short_line() -> None:
    assert repr(Diagonal(MEAN, torch.ones(2, 3))) == "Diagonal(shape=(2, 3), dtype=torch.float32)"


def test_importing_posteriors_does_not_import_torch() -> None:
    code = "import sys, mergekit_bayes.posterior; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
