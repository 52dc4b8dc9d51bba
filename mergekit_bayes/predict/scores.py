"""How good probabilities are: accuracy (of all, and of the surest), negative log-likelihood, Brier score, calibration.

Each score is a function of averages over examples, and is kept as what each example adds to these averages. The
scores and their bootstrap intervals are then computed from one and the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict.choices import ChoicePrediction
from mergekit_bayes.predict.classes import ClassPrediction
from mergekit_bayes.predict.tokens import TokenPrediction

__all__ = [
    "BINS",
    "Score",
    "calibration_gaps",
    "choice_scores",
    "class_scores",
    "selective_accuracy",
    "token_scores",
]

BINS = 15
"""Bins of the calibration error unless another number is asked for; the number of Guo et al. 2017"""


@dataclass(frozen=True, eq=False)
class Score:
    """A score as what each example adds to it.

    Attributes:
        name: what tables call it.
        parts: (examples, averages), float64.
        combine: averages (..., averages) to the score (...).
        higher_is_better: whether it is.
    """

    name: str
    parts: Tensor
    combine: Callable[[Tensor], Tensor]
    higher_is_better: bool = False

    @property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.combine(self.parts.mean(0)))


def class_scores(prediction: ClassPrediction, *, bins: int = BINS) -> dict[str, Score]:
    """Accuracy, nll (nats), brier and ece of a classifier.

    brier is the sum over classes of (p_c - y_c)^2, from 0 to 2 (Brier 1950); ece is `calibration_gaps` of the most
    probable class.

    Args:
        prediction: with labels.
        bins: of the calibration error.

    Raises:
        EvaluateError: the prediction has no labels; fewer than one bin.
    """
    labels, probabilities = prediction.known_labels, prediction.probabilities
    target = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    squares = (probabilities - target).square().sum(-1)
    gaps = calibration_gaps(prediction.confidence, prediction.correct, bins=bins)
    scores = (
        Score("accuracy", prediction.correct.double()[:, None], _only, higher_is_better=True),
        Score("nll", prediction.nll[:, None], _only),
        Score("brier", squares[:, None], _only),
        Score("ece", gaps, _sum_of_sizes),
    )
    return {score.name: score for score in scores}


def choice_scores(prediction: ChoicePrediction, sizes: Tensor, *, bins: int = BINS) -> dict[str, Score]:
    """The scores of a classifier whose classes are the choices of a question, and normalised_accuracy.

    The latter answers with the choice that has the highest log-likelihood per byte, so that long choices are not at a
    disadvantage; probabilities and all other scores are those of whole choices.

    Args:
        prediction: with answers.
        sizes: bytes of each choice, (questions, choices), 1 where a question has no such choice.
        bins: of the calibration error.

    Raises:
        EvaluateError: the prediction has no answers; fewer than one bin.
    """
    right = prediction.best_per_byte(sizes) == prediction.known_labels
    normalised = Score("normalised_accuracy", right.double()[:, None], _only, higher_is_better=True)
    scores = class_scores(prediction, bins=bins)
    return {"accuracy": scores["accuracy"], normalised.name: normalised, **scores}


def token_scores(prediction: TokenPrediction, *, bins: int = BINS) -> dict[str, Score]:
    """The nll (nats per token) of a language model, and with `vocabulary` accuracy and ece of its most probable token.

    Args:
        prediction: of targets.
        bins: of the calibration error.

    Raises:
        EvaluateError: fewer than one bin.
    """
    scores = [Score("nll", prediction.nll[:, None], _only)]
    whole = prediction.vocabulary
    if whole is not None:
        gaps = calibration_gaps(whole.confidence, whole.correct, bins=bins)
        scores.append(Score("accuracy", whole.correct.double()[:, None], _only, higher_is_better=True))
        scores.append(Score("ece", gaps, _sum_of_sizes))
    return {score.name: score for score in scores}


def calibration_gaps(confidence: Tensor, correct: Tensor, *, bins: int = BINS) -> Tensor:
    r"""What each example adds to the expected calibration error over bins of equal width.

        ECE = sum_b (n_b / n) |mean confidence in b - accuracy in b| = sum_b |mean_i 1[i in b] (confidence_i -
        correct_i)|

    (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599.) Bin b holds confidences in (b / bins, (b + 1) / bins]; 0
    is in the first. The number of bins changes the value: name it with the score.

    Args:
        confidence: in [0, 1], (examples,).
        correct: bool, (examples,).
        bins: at least 1.

    Returns:
        (examples, bins), float64: confidence minus correctness in the example's bin, 0 in the others.

    Raises:
        EvaluateError: fewer than one bin, shapes that differ, or confidences outside [0, 1].
    """
    if bins < 1 or confidence.shape != correct.shape or confidence.dim() != 1 or not len(confidence):
        seen = f"{bins} bins, confidences {tuple(confidence.shape)}, correct {tuple(correct.shape)}"
        raise EvaluateError(f"calibration: {seen}; expected at least one bin and as many of both, one or more")
    sure = confidence.double()
    if not ((sure >= 0) & (sure <= 1 + 1e-9)).all():
        raise EvaluateError(f"calibration: confidences from {sure.min()} to {sure.max()}; expected 0 to 1")
    places = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gaps = torch.zeros(len(sure), bins, dtype=torch.float64)
    return gaps.scatter_(1, places[:, None], (sure - correct.double())[:, None])


def selective_accuracy(confidence: Tensor, correct: Tensor, coverage: float) -> Score:
    """Accuracy on the share of examples that a model is surest of, which answers these and hands on the others.

    (El-Yaniv and Wiener, JMLR 2010; Geifman and El-Yaniv 2017, arXiv 1705.08500.) Exactly coverage times n examples
    are answered: of those with the same confidence at the edge each counts with the same fraction, so that neither
    ties nor the order of examples decide. In bootstrap intervals the edge stays where it is for all examples.

    Args:
        confidence: probability of the answer, (examples,).
        correct: whether it is right, bool, (examples,).
        coverage: in (0, 1].

    Raises:
        EvaluateError: a coverage outside, or shapes that differ.
    """
    if not 0 < coverage <= 1 or confidence.shape != correct.shape or confidence.dim() != 1 or not len(confidence):
        seen = f"coverage {coverage}, confidences {tuple(confidence.shape)}, correct {tuple(correct.shape)}"
        raise EvaluateError(f"selective accuracy: {seen}; expected a share above 0, at most 1, and as many of both")
    sure, wanted = confidence.double(), coverage * len(confidence)
    edge = sure.sort(descending=True).values[min(math.ceil(wanted), len(sure)) - 1]
    above, at = sure > edge, sure == edge
    kept = above.double() + at.double() * ((wanted - int(above.sum())) / int(at.sum()))
    parts = torch.stack([kept * correct.double(), kept], -1)
    return Score(f"selective_accuracy@{coverage:g}", parts, _ratio, higher_is_better=True)


def _only(averages: Tensor) -> Tensor:
    return averages[..., 0]


def _ratio(averages: Tensor) -> Tensor:
    return averages[..., 0] / averages[..., 1]


def _sum_of_sizes(averages: Tensor) -> Tensor:
    return averages.abs().sum(-1)
