"""Curvature from the state of Adam against squared gradients of examples."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.errors import NonFiniteError, NumericalError
from mergekit_bayes.precision.adam import adam_curvature


def test_many_steps_with_mean_zero_give_the_empirical_fisher() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    batch, steps, units = 16, 2000, 1000
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.0, betas=(0.9, 0.999))
    for _ in range(steps):
        examples = torch.randn(batch, 3, generator=generator, dtype=torch.float64) * spread
        weight.grad = examples.mean(0)  # of a mean loss whose examples have these gradients
        optimizer.step()
    state = optimizer.state[weight]["exp_avg_sq"]
    found = adam_curvature({"w": state}, step=steps, beta2=0.999, batch_size=batch, units=units)["w"]
    torch.testing.assert_close(found.double(), units * spread**2, rtol=0.2, atol=0)


def test_the_first_step_is_debiased() -> None:
    gradient = torch.tensor([1.0, -2.0, 0.0])
    state = (1 - 0.999) * gradient**2
    found = adam_curvature({"w": state}, step=1, beta2=0.999, batch_size=4, units=10)["w"]
    torch.testing.assert_close(found, 40 * gradient**2)
    assert found.dtype == torch.float32


def test_what_is_refused() -> None:
    good = {"exp_avg_sq": {"w": torch.ones(2)}, "step": 1, "beta2": 0.9, "batch_size": 4, "units": 10}
    assert adam_curvature(**good)
    for wrong in ({"step": 0}, {"beta2": 1.0}, {"batch_size": 0}, {"units": float("inf")}, {"beta2": float("nan")}):
        with pytest.raises(NumericalError, match="expected a step of at least 1"):
            adam_curvature(**{**good, **wrong})
    with pytest.raises(NumericalError, match="'w' has -1"):
        adam_curvature(**{**good, "exp_avg_sq": {"w": torch.tensor([-1.0])}})
    with pytest.raises(NonFiniteError, match="'w' is not finite"):
        adam_curvature(**{**good, "exp_avg_sq": {"w": torch.tensor([1.0, float("nan")])}})
