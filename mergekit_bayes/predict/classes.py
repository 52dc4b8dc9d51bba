"""What a classifier predicts, at its mean or averaged over samples of its posterior."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict.attach import AttachedPosterior
from mergekit_bayes.predict.average import LogMean, Mean, entropy
from mergekit_bayes.predict.batches import Batch, Forward, evaluating, labels_of, logits_of, to_device
from mergekit_bayes.predict.draws import choose_draws
from mergekit_bayes.predict.precisions import PrecisionSource

__all__ = ["ClassPrediction", "predict_probabilities"]


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """Probabilities of classes, averaged over samples; float64 on the CPU, in the order of the batches.

    Attributes:
        log_probabilities: logarithm of the averaged probabilities, (examples, classes).
        expected_entropy: average over samples of the entropy of one sample's probabilities, nats, (examples,).
        labels: the right classes, (examples,); None if the batches had none.
        samples: how many were averaged; 0 is the mean of the posterior.
        temperature: of the samples.
        seed: of the samples.
    """

    log_probabilities: Tensor
    expected_entropy: Tensor
    labels: Tensor | None
    samples: int
    temperature: float
    seed: int

    @property
    def probabilities(self) -> Tensor:
        """Averaged probabilities, (examples, classes)."""
        return self.log_probabilities.exp()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the averaged probabilities, nats, (examples,): all that is uncertain."""
        return entropy(self.log_probabilities)

    @property
    def mutual_information(self) -> Tensor:
        """Entropy minus expected entropy, nats, (examples,): what knowing the weights would tell; 0 at the mean."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def nll(self) -> Tensor:
        """Minus the log-probability of the right class, nats, (examples,).

        Raises:
            EvaluateError: the batches had no labels.
        """
        return -self.log_probabilities.gather(1, self.known_labels[:, None])[:, 0]

    @property
    def confidence(self) -> Tensor:
        """Probability of the most probable class, (examples,)."""
        return self.probabilities.amax(-1)

    @property
    def correct(self) -> Tensor:
        """Whether the most probable class is the right one, bool, (examples,).

        Raises:
            EvaluateError: the batches had no labels.
        """
        return self.log_probabilities.argmax(-1) == self.known_labels

    @property
    def known_labels(self) -> Tensor:
        """The labels.

        Raises:
            EvaluateError: the batches had none.
        """
        if self.labels is None:
            raise EvaluateError("prediction: the batches had no labels; expected them under `labels`")
        return self.labels


def predict_probabilities(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: PrecisionSource | AttachedPosterior | None = None,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    forward: Forward | None = None,
) -> ClassPrediction:
    """Predicts class probabilities p(y | x) = (1/S) sum_s softmax(f(x; theta_s)), theta_s from the posterior.

    Every sample is drawn once and sees all the data. The model is in evaluation mode meanwhile and unchanged after.

    Args:
        model: gives logits (examples, classes).
        batches: mappings of the model's arguments (with `labels`), pairs (inputs, labels), or inputs. They are read
            once and kept; outputs are added up, so that memory does not grow with the number of samples.
        precision: as `attach_posterior` takes it; not needed at the mean.
        samples: S; 0 predicts at the mean.
        temperature: of the samples, on the scale of the data: 1 is the posterior, 0 the mean.
        seed: of the samples.
        forward: computes the logits where calling the model with a batch does not: for the answers of a multiple-choice
            question, those of the answers' tokens.

    Raises:
        EvaluateError: no batches, labels that are no classes of the model, outputs that are no logits.
        NonFiniteError: the model computed NaN.
        NumericalError: an impossible temperature or precision.
        CheckpointError: precisions that do not fit the model; see `attach_posterior`.
    """
    draws = choose_draws(model, precision, samples=samples, temperature=temperature, seed=seed)
    read = [labels_of(batch) for batch in batches]
    if not read:
        raise EvaluateError("prediction: there are no batches; expected at least one")
    average, uncertainty = LogMean(), Mean()
    with evaluating(model):
        for index in draws.indices:
            with draws.held(index):
                found = torch.cat([_log_probabilities(model, inputs, forward or logits_of) for inputs, _ in read])
            average.add(draws.finite(found, index))
            uncertainty.add(entropy(found))
    result = average.result()
    labels = _labels([labels for _, labels in read], result)
    return ClassPrediction(result, uncertainty.result(), labels, draws.samples, draws.temperature, seed)


def _log_probabilities(model: nn.Module, inputs: Any, forward: Forward) -> Tensor:
    logits = forward(model, to_device(inputs, model))
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise EvaluateError(
            f"prediction: the logits have shape {tuple(logits.shape)}; expected (examples, classes) with two classes "
            "or more; predict_next_tokens is for language models"
        )
    return logits.cpu().double().log_softmax(-1)


def _labels(parts: Sequence[Tensor | None], predicted: Tensor) -> Tensor | None:
    given = [torch.as_tensor(part).reshape(-1).cpu() for part in parts if part is not None]
    if not given:
        return None
    labels = torch.cat(given)
    examples, classes = predicted.shape
    if len(given) < len(parts) or len(labels) != examples:
        raise EvaluateError(f"prediction: {len(labels)} labels for {examples} examples; expected one for each, or none")
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
        seen = f"prediction: labels of {labels.dtype} from {labels.min()} to {labels.max()}"
        raise EvaluateError(
            f"{seen}; expected whole numbers from 0 to {classes - 1}, as the model has {classes} classes"
        )
    return labels.long()
