"""Class probabilities are averages over samples: exact integrals, an oracle that averages naively, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError, NonFiniteError, NumericalError
from mergekit_bayes.predict import attach_posterior, predict_probabilities, sample_posterior
from tests.predict.small_models import OneWeight, classifier, precisions_of, same, weights_in

MEAN, PRECISION = 1.2, 0.8
POINTS = torch.tensor([-2.0, 0.1, 1.0, 4.0], dtype=torch.float64)


def batches(count: int = 4, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def moments(values: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of sigmoid(w x) by Gauss-Hermite."""
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(80))
    w = MEAN + math.sqrt(temperature / PRECISION) * nodes
    chances, weights = torch.sigmoid(values[:, None] * w), weights / math.sqrt(2 * math.pi)
    mean = chances @ weights
    return mean, (chances.square() @ weights - mean.square()).sqrt()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_a_logistic_model_predicts_its_integral(temperature: float) -> None:
    model = OneWeight(MEAN)
    found = predict_probabilities(
        model, [POINTS], {"w": PRECISION}, samples=2000, temperature=temperature, seed=1
    ).probabilities[:, 1]
    exact, deviation = moments(POINTS, temperature)
    assert ((found - exact).abs() < 4 * deviation / math.sqrt(2000)).all()


def test_the_integral_is_neither_the_mean_nor_an_average_of_logits() -> None:
    model = OneWeight(MEAN)
    far = POINTS[-1:]
    found = predict_probabilities(model, [far], {"w": PRECISION}, samples=1000).probabilities[0, 1]
    at_mean = predict_probabilities(model, [far]).probabilities[0, 1]  # and of averaged logits: they are linear in w
    assert at_mean == torch.sigmoid(MEAN * far)
    assert found < at_mean - 0.05


def test_a_probit_model_predicts_its_closed_form() -> None:
    """Phi(w x) averaged over w ~ N(m, 1 / S) is Phi(m x / sqrt(1 + x^2 / S))."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        chance = normal.cdf(model.w * x)
        return torch.stack([1 - chance, chance], -1).log()

    found = predict_probabilities(OneWeight(MEAN), [POINTS], {"w": PRECISION}, samples=2000, forward=forward)
    exact = normal.cdf(MEAN * POINTS / (1 + POINTS.square() / PRECISION).sqrt())
    assert ((found.probabilities[:, 1] - exact).abs() < 4 * 0.5 / math.sqrt(2000)).all()


def test_the_average_is_that_of_the_samples_one_by_one() -> None:
    model, data = classifier(), batches()
    precisions, before = precisions_of(model), weights_in(model)
    found = predict_probabilities(model, data, precisions, samples=5, temperature=0.5, seed=3)
    one_by_one = []
    model.eval()
    with torch.no_grad():
        for sample in range(5):
            with sample_posterior(model, precisions, sample=sample, temperature=0.5, seed=3):
                one_by_one.append(torch.cat([model(x).double().softmax(-1) for x, _ in data]))
    stacked = torch.stack(one_by_one)
    torch.testing.assert_close(found.probabilities, stacked.mean(0))
    entropies = -(stacked * stacked.log()).sum(-1)
    torch.testing.assert_close(found.expected_entropy, entropies.mean(0))
    of_average = -(stacked.mean(0) * stacked.mean(0).log()).sum(-1)
    torch.testing.assert_close(found.entropy, of_average)
    torch.testing.assert_close(found.mutual_information, of_average - entropies.mean(0))
    assert (found.mutual_information > 0).all()
    labels = torch.cat([y for _, y in data])
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.nll, nn.functional.nll_loss(stacked.mean(0).log(), labels, reduction="none"))
    assert torch.equal(found.correct, stacked.mean(0).argmax(-1) == labels)
    torch.testing.assert_close(found.confidence, stacked.mean(0).amax(-1))
    assert same(weights_in(model), before)


@pytest.mark.parametrize("options", [{}, {"samples": 0}, {"samples": 4, "temperature": 0.0}])
def test_without_samples_or_temperature_it_is_the_mean(options: dict[str, float]) -> None:
    model, data = classifier(), batches()
    found = predict_probabilities(model, data, precisions_of(model), **options)
    with torch.no_grad():
        expected = torch.cat([model.eval()(x).double().softmax(-1) for x, _ in data])
    torch.testing.assert_close(found.probabilities, expected)
    assert found.samples == 0
    assert found.mutual_information.abs().max() == 0


def test_modes_of_modules_are_as_they_were() -> None:
    model = classifier()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(EvaluateError):
        predict_probabilities(model, [(torch.zeros(2, 5), torch.tensor([0, 3]))])
    predict_probabilities(model, batches())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_can_be_a_generator_read_once() -> None:
    model, data = classifier(), batches()
    posterior = attach_posterior(model, precisions_of(model))
    listed = predict_probabilities(model, data, posterior, samples=3)
    streamed = predict_probabilities(model, iter(data), posterior, samples=3)
    assert torch.equal(listed.log_probabilities, streamed.log_probabilities)


def test_an_impossible_class_stays_impossible() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        logits = model(x)
        return torch.cat([logits, torch.full_like(logits[:, :1], -math.inf)], -1)

    found = predict_probabilities(OneWeight(MEAN), [POINTS], {"w": PRECISION}, samples=3, forward=forward)
    assert (found.probabilities[:, 2] == 0).all()
    assert found.entropy.isfinite().all()
    assert found.expected_entropy.isfinite().all()


def test_numbers_that_are_no_probabilities_are_refused() -> None:
    model = OneWeight(MEAN)
    with torch.no_grad():
        model.w.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="at its mean"):
        predict_probabilities(model, [POINTS])
    with torch.no_grad():
        model.w.fill_(1e300)
    with pytest.raises(NonFiniteError, match="sample 0 at temperature 2 gives NaN"):
        predict_probabilities(model, [1e300 * POINTS], {"w": 1.0}, samples=2, temperature=2)
    assert model.w.item() == 1e300


class Scalar(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (classifier(), [], {}, "there are no batches"),
        (classifier(), batches(), {"samples": -1}, "samples is -1"),
        (classifier(), batches(), {"samples": 2}, "2 samples without precisions"),
        (
            classifier(),
            [(torch.zeros(2, 5), torch.tensor([0, 3]))],
            {},
            "from 0 to 3; expected whole numbers from 0 to 2",
        ),
        (classifier(), [(torch.zeros(2, 5), torch.tensor([-1, 0]))], {}, "from -1 to 0; expected"),
        (classifier(), [(torch.zeros(2, 5), torch.tensor([0.5, 0]))], {}, "labels of torch.float32"),
        (classifier(), [(torch.zeros(2, 5), torch.tensor([0]))], {}, "1 labels for 2 examples"),
        (classifier(), [(torch.zeros(2, 5), torch.tensor([0, 1])), torch.zeros(1, 5)], {}, "2 labels for 3 examples"),
        (classifier(), [(torch.zeros(2, 5), 1, 2)], {}, "a batch is a sequence of 3"),
        (Scalar(torch.zeros(2, 1)), [torch.zeros(2)], {}, "two classes or more"),
        (Scalar(torch.zeros(2, 3, 4)), [torch.zeros(2)], {}, "predict_next_tokens is for language models"),
        (Scalar(None), [torch.zeros(2)], {}, "returns a NoneType without logits"),
    ],
)
def test_bad_input_is_refused(model: nn.Module, data: list[object], options: dict[str, int], message: str) -> None:
    with pytest.raises(EvaluateError, match=message):
        predict_probabilities(model, data, **options)


def test_scores_need_labels() -> None:
    prediction = predict_probabilities(classifier(), [x for x, _ in batches()])
    assert prediction.labels is None
    with pytest.raises(EvaluateError, match="no labels"):
        _ = prediction.nll
    with pytest.raises(EvaluateError, match="no labels"):
        _ = prediction.correct


def test_an_impossible_temperature_is_refused_also_at_the_mean() -> None:
    with pytest.raises(NumericalError, match="temperature is -1"):
        predict_probabilities(classifier(), batches(), temperature=-1)
