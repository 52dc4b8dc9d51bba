"""Curvature to precision, diagnostics and starting values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mergekit_bayes import IVON
from mergekit_bayes.checkpoint.sidecar_metadata import SidecarMetadata
from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune import diagnose, export_precision, starting_values


def trained(steps: int = 50, beta2: float = 0.99, weight_decay: float = 1e-2) -> tuple[IVON, nn.Parameter]:
    parameter = nn.Parameter(torch.ones(400))
    optimizer = IVON(
        [parameter], lr=0.01, ess=500.0, hess_init=3.0, beta2=beta2, weight_decay=weight_decay, clip_radius=0.1
    )
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            (0.4 * parameter**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, parameter


def test_raw_export_is_n_times_hess_plus_decay_and_fits_the_metadata() -> None:
    optimizer, parameter = trained()
    exported = export_precision(optimizer, [("weight", parameter)], num_examples=800)
    expected = 800 * (optimizer.state[parameter]["hess"] + 1e-2)
    torch.testing.assert_close(exported.precisions["weight"], expected)
    metadata = SidecarMetadata(**exported.metadata, space="full", mean_fingerprint="blake2b-16:" + "0" * 32)
    assert (metadata.steps, metadata.prior_precision, metadata.debiased) == (50, pytest.approx(8.0), False)
    assert exported.floored == 0


def test_debiased_export_removes_the_initial_curvature_and_floors_the_rest() -> None:
    optimizer, parameter = trained()
    exported = export_precision(optimizer, [("weight", parameter)], num_examples=10, debias=True)
    share = 0.99**50
    learned = (optimizer.state[parameter]["hess"] - share * 3.0) / (1 - share)
    seen = exported.precisions["weight"] / 10 - 1e-2
    free = learned > 0.01
    torch.testing.assert_close(seen[free], learned[free], rtol=1e-4, atol=1e-4)
    assert (seen > 0).all()
    assert exported.floored == int((seen < 1.01 * seen.min()).sum()) > 0
    # of the true curvature 0.8 the raw one, still 60% its initial value 3, is far off
    assert float(learned.median()) < float(optimizer.state[parameter]["hess"].median())


@pytest.mark.parametrize(("samples", "antithetic"), [(1, False), (4, False), (2, True)])
def test_the_share_of_squared_gradients_is_taken_out(samples: int, antithetic: bool) -> None:
    """Means of Gaussians of variance 1, from batches of 4: the curvature is 1 and so is the Fisher information."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(2000))
    options = {"lr": 0.05, "ess": 2000.0, "hess_init": 1.0, "beta2": 0.99, "weight_decay": 0.0}
    optimizer = IVON([parameter], **options, mc_samples=samples, antithetic=antithetic)
    for _ in range(1000):
        batch = torch.randn(4, 2000)
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                (0.5 * (parameter - batch).square()).mean(0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    raw, right = (
        export_precision(optimizer, [("w", parameter)], num_examples=10, debias=True, units_per_step=units)
        for units in (None, 4)
    )
    expected = 1.0 if antithetic else 1 + 0.01 * 2000 / (2 * 4 * samples)
    assert float(raw.precisions["w"].mean()) / 10 == pytest.approx(expected, rel=0.07)
    assert float(right.precisions["w"].mean()) / 10 == pytest.approx(1.0, rel=0.07)


@pytest.mark.parametrize(("steps", "beta2"), [(0, 0.9), (5, 1.0)])
def test_nothing_to_debias_is_an_error(steps: int, beta2: float) -> None:
    optimizer, parameter = trained(steps, beta2)
    with pytest.raises(FinetuneError, match="weight"):
        export_precision(optimizer, [("weight", parameter)], num_examples=10, debias=True)


def test_frozen_parameters_are_passed_over_and_bad_arguments_refused() -> None:
    optimizer, parameter = trained(2)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    exported = export_precision(optimizer, [("a", parameter), ("b", frozen)], num_examples=1)
    assert list(exported.precisions) == ["a"]
    with pytest.raises(FinetuneError, match="num_examples"):
        export_precision(optimizer, [("a", parameter)], num_examples=0)
    with pytest.raises(FinetuneError, match="stranger"):
        export_precision(optimizer, [("stranger", nn.Parameter(torch.ones(2)))], num_examples=1)


def test_diagnostics_tell_a_frozen_curvature_from_a_moving_one() -> None:
    still, moving = diagnose(trained(20, beta2=0.999999)[0]), diagnose(trained(300, beta2=0.99)[0])
    assert still.moved == 0.0
    assert still.hess_init_share == pytest.approx(0.999999**20)
    assert moving.moved > 0.5
    assert 0 <= moving.clipped <= 1
    assert moving.lowest_precision > 0
    assert still.noise_to_weight == pytest.approx(1 / math.sqrt(500 * 3.01), rel=0.3)


def test_diagnostics_count_clipped_entries() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = IVON([parameter], lr=0.0, ess=1e6, hess_init=1.0, weight_decay=0.0, clip_radius=0.5)
    with pytest.raises(FinetuneError, match="sampled"):
        diagnose(optimizer)
    with optimizer.sampled_params(train=True):
        parameter.grad = torch.tensor([0.1, 0.4, 0.6, -2.0])
    optimizer.step()
    assert diagnose(optimizer).clipped == 0.5


def test_starting_values_give_the_ratio_they_promise() -> None:
    torch.manual_seed(0)
    a, b = nn.Parameter(0.02 * torch.randn(8, 64)), nn.Parameter(torch.zeros(64, 8))
    values = starting_values([a, b], units_seen=10_000, steps=500, noise_to_weight=0.2, weight_decay=1e-6)
    optimizer = IVON([a], lr=0.1, ess=values.ess, hess_init=values.hess_init, beta2=values.beta2, weight_decay=1e-6)
    with optimizer.sampled_params():
        pass
    assert diagnose(optimizer).noise_to_weight == pytest.approx(0.2, rel=1e-4)
    assert values.beta2**500 == pytest.approx(0.05)


@pytest.mark.parametrize(
    "change",
    [{"units_seen": 0}, {"steps": 0}, {"noise_to_weight": 0.0}, {"remaining_share": 1.0}, {"weight_decay": 9e9}],
)
def test_impossible_starting_values_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(FinetuneError, match="starting values"):
        starting_values([nn.Parameter(torch.ones(3))], **{"units_seen": 10, "steps": 10, **change})
    with pytest.raises(FinetuneError, match="other than zero"):
        starting_values([nn.Parameter(torch.zeros(3))], units_seen=10, steps=10)
