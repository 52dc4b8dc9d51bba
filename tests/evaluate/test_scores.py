"""Scores against scikit-learn and against oracles that count one example at a time."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.evaluate import (
    ClassPrediction,
    TokenPrediction,
    VocabularyPrediction,
    calibration_gaps,
    class_scores,
    token_scores,
)


def predicted(log_probabilities: Tensor, labels: Tensor) -> ClassPrediction:
    return ClassPrediction(log_probabilities, torch.zeros(len(labels)), labels, samples=0, temperature=0.0, seed=0)


def naive_ece(confidence: Tensor, correct: Tensor, bins: int) -> float:
    total = 0.0
    for place in range(bins):
        low, high = place / bins, (place + 1) / bins
        inside = [
            (sure, right)
            for sure, right in zip(confidence.tolist(), correct.tolist(), strict=True)
            if low < sure <= high or (place == 0 and sure == 0)
        ]
        if inside:
            gap = math.fsum(sure for sure, _ in inside) - sum(right for _, right in inside)
            total += abs(gap) / len(confidence)
    return total


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
def test_scores_of_random_predictions(classes: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = sharpness * torch.randn(400, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (400,), generator=generator)
    prediction = predicted(logits.log_softmax(-1), labels)
    scores = class_scores(prediction, bins=10)
    assert [*scores] == ["accuracy", "nll", "brier", "ece"]
    probabilities, every = prediction.probabilities.numpy(), range(classes)
    assert scores["accuracy"].value == pytest.approx(accuracy_score(labels, probabilities.argmax(-1)))
    chances = prediction.probabilities.gather(1, labels[:, None]).numpy()
    if chances.min() > 1e-15:  # scikit-learn clips below
        assert scores["nll"].value == pytest.approx(log_loss(labels, probabilities, labels=every))
    brier = brier_score_loss(labels, probabilities, labels=every, scale_by_half=False)
    assert scores["brier"].value == pytest.approx(brier)
    assert scores["ece"].value == pytest.approx(naive_ece(prediction.confidence, prediction.correct, 10))
    assert scores["accuracy"].higher_is_better
    assert not scores["nll"].higher_is_better


@pytest.mark.parametrize("bins", [1, 4, 10, 15])
def test_edges_of_bins_belong_below(bins: int) -> None:
    confidence = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 0.2500001, 0.4999999], dtype=torch.float64)
    correct = torch.tensor([0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    ece = float(calibration_gaps(confidence, correct, bins=bins).mean(0).abs().sum())
    assert ece == pytest.approx(naive_ece(confidence, correct, bins))


def test_a_perfectly_calibrated_predictor_has_no_error() -> None:
    confidence = torch.tensor([0.75] * 4 + [0.5] * 4, dtype=torch.float64)
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 1, 0], dtype=torch.bool)
    assert calibration_gaps(confidence, correct).mean(0).abs().sum() == 0


def test_certain_and_wrong_is_as_bad_as_it_gets() -> None:
    prediction = predicted(
        torch.tensor([[0.0, -math.inf], [0.0, -math.inf]], dtype=torch.float64), torch.tensor([1, 1])
    )
    scores = {name: score.value for name, score in class_scores(prediction).items()}
    assert scores == {"accuracy": 0.0, "nll": math.inf, "brier": 2.0, "ece": 1.0}


def test_a_single_example_and_a_single_class_present_are_fine() -> None:
    prediction = predicted(torch.tensor([[0.9, 0.1]], dtype=torch.float64).log(), torch.tensor([0]))
    scores = {name: score.value for name, score in class_scores(prediction).items()}
    assert scores == pytest.approx({"accuracy": 1.0, "nll": -math.log(0.9), "brier": 0.02, "ece": 0.1})


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "message"),
    [
        (torch.tensor([0.5]), torch.tensor([True]), 0, "0 bins"),
        (torch.tensor([0.5]), torch.tensor([True, False]), 5, r"confidences \(1,\), correct \(2,\)"),
        (torch.tensor([]), torch.tensor([], dtype=torch.bool), 5, "one or more"),
        (torch.tensor([1.5]), torch.tensor([True]), 5, "confidences from 1.5 to 1.5"),
        (torch.tensor([-0.5]), torch.tensor([True]), 5, "confidences from -0.5"),
        (torch.tensor([math.nan]), torch.tensor([True]), 5, "confidences from nan"),
    ],
)
def test_bad_input_is_refused(confidence: Tensor, correct: Tensor, bins: int, message: str) -> None:
    with pytest.raises(EvaluateError, match=message):
        calibration_gaps(confidence, correct, bins=bins)


def test_scores_of_tokens() -> None:
    chances = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
    correct = torch.tensor([True, False, True])
    confidence = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64)
    whole = VocabularyPrediction(torch.ones(3), torch.ones(3), confidence, correct)
    rows = torch.tensor([0, 0, 1])
    for vocabulary in (None, whole):
        prediction = TokenPrediction(chances.log(), rows, torch.zeros(2), vocabulary, 0, 0.0, 0)
        scores = {name: score.value for name, score in token_scores(prediction, bins=10).items()}
        assert scores["nll"] == pytest.approx(-float(chances.log().mean()))
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["ece"] == pytest.approx(naive_ece(confidence, correct, 10))
