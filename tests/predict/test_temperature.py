"""The chosen temperature is where the exact loss is lowest, and 0 where samples do not help."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError, NonFiniteError, NumericalError
from mergekit_bayes.predict import attach_posterior, choose_temperature, predict_next_tokens, predict_probabilities
from tests.predict.small_models import NextToken, OneWeight, same, weights_in

MEAN, PRECISION = 2.0, 1.0


def coin(points: int, chance: float) -> list[tuple[Tensor, Tensor]]:
    """Inputs of 1, and labels of which a share is 1: the best prediction is that share."""
    labels = (torch.arange(points) < chance * points).long()
    return [(torch.ones(points, dtype=torch.float64), labels)]


def exact_loss(temperature: float, chance: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    w = MEAN + math.sqrt(temperature / PRECISION) * nodes
    averaged = float(1 / (1 + np.exp(-w)) @ weights / math.sqrt(2 * math.pi))
    return -chance * math.log(averaged) - (1 - chance) * math.log(1 - averaged)


def test_it_finds_the_lowest_exact_loss() -> None:
    """The mean predicts sigmoid(2) = 0.88, the labels say 0.75: the more spread, the closer to 1/2."""
    chosen = choose_temperature(OneWeight(MEAN), coin(100, 0.75), {"w": PRECISION}, samples=400, seed=1)
    grid = [temperature / 50 for temperature in range(1, 600)]
    best = min(grid, key=lambda temperature: exact_loss(temperature, 0.75))
    assert 2 < best < 8
    # the minimum is flat, and 400 samples are not the integral
    assert abs(chosen.temperature / best - 1) < 0.4
    assert exact_loss(chosen.temperature, 0.75) - exact_loss(best, 0.75) < 2e-3
    assert chosen.nll == min(loss for _, loss in chosen.tried)
    assert chosen.nll_of_mean == pytest.approx(exact_loss(0.0, 0.75))
    assert not chosen.at_edge


def test_it_is_zero_where_samples_only_hurt() -> None:
    chosen = choose_temperature(OneWeight(MEAN), coin(100, 0.95), {"w": PRECISION}, samples=200)
    # not exactly zero: 200 samples have an average of their own, which may happen to predict better
    assert chosen.temperature < 0.02
    assert chosen.nll_of_mean - chosen.nll < 1e-3


def test_it_says_when_a_higher_one_may_be_better() -> None:
    options = {"samples": 200, "candidates": (0.01, 0.1)}
    chosen = choose_temperature(OneWeight(MEAN), coin(100, 0.6), {"w": PRECISION}, **options)
    assert chosen.at_edge
    assert chosen.temperature == 0.1


def test_all_temperatures_share_their_random_numbers() -> None:
    """With numbers of their own, ten samples would be far noisier than the loss differs between neighbours."""
    candidates = (0.0, 1.0, 1.0001)
    chosen = choose_temperature(OneWeight(MEAN), coin(100, 0.75), {"w": PRECISION}, samples=10, candidates=candidates)
    losses = dict(chosen.tried)
    assert 0 < abs(losses[1.0] - losses[1.0001]) < 1e-4
    model, posterior = OneWeight(MEAN), {"w": PRECISION}
    again = predict_probabilities(model, coin(100, 0.75), posterior, samples=10, temperature=chosen.temperature)
    assert float(again.nll.mean()) == chosen.nll


def test_a_temperature_at_which_the_model_overflows_is_never_chosen() -> None:
    class Fragile(OneWeight):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits if abs(float(self.w.detach()) - MEAN) < 0.5 else logits * torch.nan

    chosen = choose_temperature(Fragile(MEAN), coin(100, 0.6), {"w": PRECISION}, samples=8)
    assert math.isfinite(chosen.nll)
    overflowed = [temperature for temperature, loss in chosen.tried if math.isinf(loss)]
    assert len(overflowed) >= 2
    assert max(temperature for temperature, _ in chosen.tried) < 10  # it stops where it is hopeless
    broken = OneWeight(math.nan)
    with pytest.raises(NonFiniteError, match="at its mean"):
        choose_temperature(broken, coin(100, 0.6), {"w": PRECISION})


def test_language_models_and_bound_options() -> None:
    model = NextToken(6)
    before = weights_in(model)
    ids = torch.randint(6, (4, 9), generator=torch.Generator().manual_seed(0))
    posterior = attach_posterior(model, {"table": 2.0})
    for predict in (predict_next_tokens, partial(predict_next_tokens, vocabulary=True)):
        chosen = choose_temperature(model, iter([(ids, ids)]), posterior, predict=predict, samples=4)
        assert chosen.nll <= chosen.nll_of_mean
    assert same(weights_in(model), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, EvaluateError, "0 samples, 10 candidates"),
        ({"candidates": ()}, EvaluateError, "0 candidates"),
        ({"candidates": (0.1, -1.0)}, NumericalError, "temperature is -1"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    model: nn.Module = OneWeight(MEAN)
    with pytest.raises(error, match=message):
        choose_temperature(model, coin(10, 0.5), {"w": PRECISION}, **options)
