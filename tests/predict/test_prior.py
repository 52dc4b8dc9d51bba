"""Another prior under the same curvature, and the one that predicts validation data best."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict import (
    attach_posterior,
    choose_prior,
    predict_probabilities,
    sample_posterior,
    with_prior,
)
from tests.merge.builders import write_checkpoint, write_precisions
from tests.posterior.kronecker_problem import Draw, matrix
from tests.predict.small_models import OneWeight, same, weights_in
from tests.predict.test_temperature import MEAN, coin, exact_loss

CURVATURE, PRIOR = 0.1, 2.0
WIDE = {"candidates": (100.0, 10.0, 1.0, 0.1, 0.01)}


def posterior_of(model: nn.Module) -> Any:
    """Of one weight, with a prior that is known."""
    return replace(attach_posterior(model, {"w": CURVATURE + PRIOR}), prior=PRIOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_diagonal_precision_is_curvature_and_prior(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.linspace(-1, 1, 6).view(2, 3)
    curvature = torch.tensor([[0.0, 0.5, 1.0], [2.0, 30.0, 400.0]])
    folder = write_checkpoint(tmp_path / "model", {"weight": weight})
    write_precisions(folder, {"weight": (curvature + 4.0).to(dtype)}, prior_precision=4.0)
    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(weight.clone())
    changed = with_prior(attach_posterior(model, folder), 0.25)
    assert changed.prior == 0.25
    torch.testing.assert_close(changed.weights[0].precision.float(), curvature + 0.25, rtol=2**-6, atol=0.02)
    again = with_prior(with_prior(changed, 100.0), 0.25)
    torch.testing.assert_close(again.weights[0].precision, changed.weights[0].precision, rtol=2**-6, atol=0.5)


@pytest.mark.parametrize("kinds", [("plain",), ("gram",), ("corrected",), ("plain", "plain")], ids=" and ".join)
def test_samples_under_another_prior_have_its_covariance(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    from tests.predict.test_correlated import COLUMNS, COUNT, ROWS, Layer, sidecar, stored

    drawn = Draw(7, shape=(ROWS, COLUMNS)).posterior(*kinds)
    model = Layer(drawn.mean, turned=True)
    attached = attach_posterior(model, sidecar(tmp_path / "model", model, stored(drawn.terms)))
    under = with_prior(attached, 2.5)
    wanted = replace_diagonal(drawn, 2.5)
    np.testing.assert_allclose(
        under.weights[0].precision.mT.double().numpy().reshape(-1), np.diag(matrix(wanted)), rtol=1e-5
    )
    before, weight, draws = weights_in(model), model.layer.get_parameter("weight"), []
    for sample in range(COUNT):
        with sample_posterior(model, under, sample=sample):
            draws.append(weight.detach().mT.double() - drawn.mean)
    assert same(weights_in(model), before)
    white = torch.stack(draws).reshape(COUNT, -1).numpy() @ np.linalg.cholesky(matrix(wanted))
    np.testing.assert_allclose(white.T @ white / COUNT, np.eye(ROWS * COLUMNS), atol=5 * (2 / COUNT) ** 0.5)


def replace_diagonal(posterior: Any, prior: float) -> Any:
    return type(posterior)(posterior.mean, posterior.diagonal.new_tensor(prior), posterior.terms)


def test_it_finds_the_lowest_exact_loss() -> None:
    """The mean predicts sigmoid(2) = 0.88, the labels say 0.75: the prior may be no tighter than that allows."""
    model = OneWeight(MEAN)
    chosen = choose_prior(model, coin(100, 0.75), posterior_of(model), samples=400, seed=1, **WIDE)
    # of the temperature test this is precision 1 at temperature 1 / S
    grid = [prior / 500 for prior in range(1, 500)]
    losses = [exact_loss(1 / (CURVATURE + prior), 0.75) for prior in grid]
    best = min(losses)
    assert exact_loss(1 / (CURVATURE + chosen.prior), 0.75) - best < 2e-3
    assert 0.02 < chosen.prior < 1
    assert chosen.nll == min(loss for _, loss in chosen.tried)
    assert chosen.nll_of_mean == pytest.approx(exact_loss(0.0, 0.75))
    assert [prior for prior, _ in chosen.tried] == sorted((prior for prior, _ in chosen.tried), reverse=True)
    assert chosen.tried[0][0] == math.inf
    assert not chosen.at_edge
    again = predict_probabilities(
        model, coin(100, 0.75), with_prior(posterior_of(model), chosen.prior), samples=400, seed=1
    )
    assert float(again.nll.mean()) == pytest.approx(chosen.nll, rel=1e-6)


def test_it_is_infinite_where_samples_only_hurt() -> None:
    """Or so high that nothing of the samples is left: an average of their own may happen to predict better."""
    model = OneWeight(MEAN)
    chosen = choose_prior(model, coin(100, 0.95), posterior_of(model), samples=200, **WIDE)
    assert chosen.prior > 20
    assert chosen.nll_of_mean - chosen.nll < 1e-3


def test_it_says_when_a_lower_one_may_be_better() -> None:
    model = OneWeight(MEAN)
    chosen = choose_prior(model, coin(100, 0.6), posterior_of(model), samples=200, candidates=(10.0, 5.0))
    assert chosen.at_edge
    assert chosen.prior == pytest.approx(5.0)


def test_bad_input_is_refused() -> None:
    model = OneWeight(MEAN)
    posterior = posterior_of(model)
    for options, message in (({"samples": 0}, "0 samples, 7 candidates"), ({"candidates": ()}, "0 candidates")):
        with pytest.raises(EvaluateError, match=message):
            choose_prior(model, coin(10, 0.5), posterior, **options)
    for prior in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(EvaluateError, match=r"prior: S_0 is .*; expected a positive number"):
            with_prior(posterior, prior)
    with pytest.raises(EvaluateError, match="do not say which prior is in them"):
        with_prior(attach_posterior(model, {"w": 1.0}), 1.0)
    with pytest.raises(EvaluateError, match="S_0 is"):
        choose_prior(model, coin(10, 0.5), posterior, candidates=(-1.0,))
    with pytest.raises(EvaluateError, match="S_0 is"):
        choose_prior(model, coin(10, 0.5), posterior, candidates=(0.0,))
