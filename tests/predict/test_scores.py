"""Scores against scikit-learn and against oracles that count one example at a time."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import Tensor

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict import (
    ClassPrediction,
    TokenPrediction,
    VocabularyPrediction,
    calibration_gaps,
    class_scores,
    selective_accuracy,
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


def mean_over_orders(confidence: list[float], correct: list[bool], coverage: float) -> float:
    """Accuracy of the first of the examples, on average over all orders in which equally sure ones may come."""
    wanted = coverage * len(confidence)
    found = []
    for order in itertools.permutations(range(len(confidence))):
        ranked = sorted(order, key=lambda index: -confidence[index])  # a stable sort keeps the order of equals
        weights = [min(1.0, max(0.0, wanted - place)) for place in range(len(ranked))]
        found.append(sum(w * correct[index] for w, index in zip(weights, ranked, strict=True)) / wanted)
    return math.fsum(found) / len(found)


@given(
    examples=st.lists(st.tuples(st.sampled_from([0.5, 0.7, 0.70000001, 1.0]), st.booleans()), min_size=1, max_size=5),
    coverage=st.one_of(st.floats(1e-3, 1.0), st.sampled_from([0.2, 0.5, 0.6, 1.0])),
)
def test_accuracy_at_coverage_is_that_of_the_surest_whatever_their_order(
    examples: list[tuple[float, bool]], coverage: float
) -> None:
    confidence, correct = map(list, zip(*examples, strict=True))
    score = selective_accuracy(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct), coverage)
    assert score.value == pytest.approx(mean_over_orders(confidence, correct, coverage), abs=1e-9)
    assert float(score.parts[:, 1].sum()) == pytest.approx(coverage * len(examples))
    assert score.higher_is_better


def test_accuracy_at_full_coverage_is_accuracy_and_ranking_pays() -> None:
    generator = torch.Generator().manual_seed(2)
    confidence = torch.rand(400, generator=generator, dtype=torch.float64)
    correct = torch.rand(400, generator=generator, dtype=torch.float64) < confidence
    values = [selective_accuracy(confidence, correct, share).value for share in (0.1, 0.5, 1.0)]
    assert values[2] == pytest.approx(float(correct.double().mean()))
    assert values == sorted(values, reverse=True)
    assert selective_accuracy(confidence, correct, 0.1).name == "selective_accuracy@0.1"


@pytest.mark.parametrize("coverage", [0.0, -0.5, 1.5, math.nan])
def test_a_coverage_that_is_none_is_refused(coverage: float) -> None:
    with pytest.raises(EvaluateError, match="selective accuracy: coverage"):
        selective_accuracy(torch.ones(2), torch.ones(2, dtype=torch.bool), coverage)
    with pytest.raises(EvaluateError, match="as many of both"):
        selective_accuracy(torch.ones(2), torch.ones(3, dtype=torch.bool), 0.5)
