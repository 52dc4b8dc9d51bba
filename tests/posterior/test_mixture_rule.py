"""Expectation maximisation against brute force on the values of the merged density."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergekit_bayes.errors import MethodError
from mergekit_bayes.posterior import (
    Diagonal,
    Isotropic,
    Kronecker,
    Mixture,
    Posterior,
    merge_mixtures,
    merge_posteriors,
)
from tests.oracles.mixture import Component, climb, log_merged
from tests.posterior.kronecker_problem import Draw, numbers

SHAPE = (2, 3)
WEIGHTS = {"simplex": (0.6, 0.4), "ones": (1.0, 1.0), "small": (0.2, 0.3)}


def _tasks(seed: int, spread: float = 1.0) -> tuple[Isotropic, list[Mixture]]:
    draw = Draw(seed, shape=SHAPE)
    base = Isotropic(draw.normal(*SHAPE), 0.3)

    def part() -> Diagonal:
        return Diagonal(base.mean + spread * draw.normal(*SHAPE), 0.3 + draw.normal(*SHAPE).square())

    return base, [
        Mixture([part() for _ in range(3)], [math.log(p) for p in (0.5, 0.3, 0.2)]),
        Mixture([part() for _ in range(2)]),
    ]


def _plain(base: Posterior, tasks: list[Mixture]) -> tuple[tuple[np.ndarray, np.ndarray], list[list[Component]]]:
    def entries(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
        return numbers(posterior.mean), numbers(posterior.precision_tensor().expand_as(posterior.mean))

    parts = [
        [(math.exp(log), *entries(part)) for log, part in zip(task.log_weights, task.components, strict=True)]
        for task in tasks
    ]
    return entries(base), parts


def _weights(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("temperature", [1 / 6, 1.0, 10.0], ids=["untempered", "per-entry", "hot"])
def test_it_ends_on_a_peak_of_the_merged_density(temperature: float, weights: tuple[float, ...]) -> None:
    base, tasks = _tasks(0)
    merged, ascent = merge_mixtures(
        base, tasks, _weights(weights), temperature=temperature, tolerance=1e-9, max_iterations=2000
    )
    assert ascent.converged
    peak = climb(numbers(merged.mean), *_plain(base, tasks), weights, temperature * 6)
    np.testing.assert_allclose(numbers(merged.mean), peak, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_every_step_climbs_and_the_objective_is_that_density(temperature: float, weights: tuple[float, ...]) -> None:
    base, tasks = _tasks(1, spread=3.0)
    for limit in (1, 2, 5, 30):
        merged, ascent = merge_mixtures(
            base, tasks, _weights(weights), temperature=temperature, tolerance=0.0, max_iterations=limit
        )
        gains = np.diff(ascent.objectives)
        assert (gains >= -1e-9).all()
        wanted = log_merged(numbers(merged.mean), *_plain(base, tasks), weights, temperature * 6)
        assert ascent.objectives[-1] == pytest.approx(wanted, rel=1e-10)
    assert len(ascent.objectives) > 2
    assert ascent.objectives[-1] > ascent.objectives[0]


def test_kronecker_components_climb_too() -> None:
    draw = Draw(2)
    base = draw.prior()
    tasks = [
        Mixture([draw.beyond(base, kind) for kind in kinds]) for kinds in (("plain", "gram"), ("corrected", "plain"))
    ]
    merged, ascent = merge_mixtures(base, tasks, _weights((1.0, 1.0)), temperature=0.05, tolerance=1e-9)
    assert type(merged) is Kronecker
    assert (np.diff(ascent.objectives) >= -1e-5).all()
    assert ascent.objectives[-1] > ascent.objectives[0]


def test_responsibilities_belong_to_the_merge() -> None:
    base, tasks = _tasks(3)
    weights = (0.8, 0.7)
    merged, ascent = merge_mixtures(base, tasks, _weights(weights), tolerance=1e-10, max_iterations=500)
    flat = [weight * share for weight, row in zip(weights, ascent.responsibilities, strict=True) for share in row]
    again = merge_posteriors(base, [part for task in tasks for part in task.components], _weights(tuple(flat)))
    assert torch.equal(again.mean, merged.mean)
    for task, row in zip(tasks, ascent.responsibilities, strict=True):
        assert math.fsum(row) == pytest.approx(1)
        np.testing.assert_allclose(row, task.responsibilities(merged.mean, temperature=6.0), atol=1e-8)


def test_temperature_goes_from_choosing_to_averaging() -> None:
    base, tasks = _tasks(4, spread=3.0)
    cold = merge_mixtures(base, tasks, _weights((0.5, 0.5)), temperature=1e-4)[1].responsibilities
    assert all(max(row) > 0.999 for row in cold)
    hot = merge_mixtures(base, tasks, _weights((0.5, 0.5)), temperature=1e9)[1].responsibilities
    np.testing.assert_allclose(hot[0], (0.5, 0.3, 0.2), atol=1e-6)
    np.testing.assert_allclose(hot[1], (0.5, 0.5), atol=1e-6)


def test_per_entry_temperature_does_not_saturate_in_large_tensors() -> None:
    """Independent entries: at temperature 1 shares do not depend on how many there are, untempered ones do."""
    shares = {}
    for size in (2000, 100_000):
        draw = Draw(5, shape=(1, size))
        base = draw.prior()
        parts = [Diagonal(base.mean + scale * draw.normal(1, size), base.mean * 0 + 2.0) for scale in (0.8, 1.0, 1.2)]
        shares[size] = merge_mixtures(base, [Mixture(parts)], _weights((1.0,)))[1].responsibilities[0]
        untempered = merge_mixtures(base, [Mixture(parts)], _weights((1.0,)), temperature=1 / size)[1]
        assert max(untempered.responsibilities[0]) > 0.999
    np.testing.assert_allclose(shares[2000], shares[100_000], atol=0.1)
    assert all(0.1 < share < 0.7 for share in shares[100_000])


def test_single_components_are_the_rule_and_may_be_removed() -> None:
    base, tasks = _tasks(6)
    singles = [task.components[0] for task in tasks]
    for weights in ((0.7, 0.9), (0.9, -0.02)):
        wanted = merge_posteriors(base, singles, _weights(weights))
        merged, ascent = merge_mixtures(base, singles, _weights(weights))
        assert torch.equal(merged.mean, wanted.mean)
        assert (ascent.responsibilities, ascent.converged) == (((1.0,), (1.0,)), True)
    posterior = merge_posteriors(base, tasks, _weights((0.5, 0.5)))
    assert type(posterior) is Diagonal
    assert torch.equal(posterior.mean, merge_mixtures(base, tasks, _weights((0.5, 0.5)))[0].mean)


def test_a_floor_reaches_the_components() -> None:
    base, tasks = _tasks(7)
    merged, _ = merge_mixtures(base, tasks, _weights((0.5, 0.5)), floor=4.0)
    assert merged.precision_tensor().min() == 4.0


def test_what_makes_no_sense_is_refused() -> None:
    base, tasks = _tasks(8)
    with pytest.raises(MethodError, match=r"source 0 has weight -0\.1 and 3 components"):
        merge_mixtures(base, tasks, _weights((-0.1, 1.0)))
    with pytest.raises(MethodError, match="the base is a mixture"):
        merge_mixtures(tasks[0], tasks, _weights((0.5, 0.5)))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(MethodError, match="temperature"):
            merge_mixtures(base, tasks, _weights((0.5, 0.5)), temperature=temperature)
    with pytest.raises(MethodError, match="one weight each"):
        merge_mixtures(base, tasks, _weights((0.5,)))
