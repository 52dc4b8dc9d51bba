r"""Which of several continuations a language model finds likeliest, at its mean or averaged over posterior samples.

    log p(c | q; theta) = sum of the log-probabilities of the tokens of choice c behind question q
    p(c is the answer)  = (1/S) sum_s softmax_c log p(c | q; theta_s) ,     theta_s from the posterior

(Choices compared by likelihood: Brown et al. 2020, arXiv 2005.14165.) Since longer choices have more tokens to lose
probability on, they are also compared by log p(c | q) / bytes of c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict.attach import AttachedPosterior
from mergekit_bayes.predict.average import LogMean, Mean, entropy
from mergekit_bayes.predict.batches import evaluating
from mergekit_bayes.predict.classes import ClassPrediction
from mergekit_bayes.predict.draws import choose_draws
from mergekit_bayes.predict.precisions import PrecisionSource
from mergekit_bayes.predict.tokens import Targets, row_log_probabilities, targets_of

__all__ = ["ChoicePrediction", "predict_choices"]


@dataclass(frozen=True, eq=False)
class ChoicePrediction(ClassPrediction):
    """Probabilities of the choices of questions, averaged over samples; float64 on the CPU, in their order.

    Choices are the classes; where a question has fewer than others, the rest have probability 0.

    Attributes:
        log_likelihoods: logarithm of the averaged probability of each choice's tokens together, (questions, choices);
            -inf where a question has no such choice.
    """

    log_likelihoods: Tensor

    def best_per_byte(self, sizes: Tensor) -> Tensor:
        """The choice with the highest log-likelihood per byte, (questions,).

        Args:
            sizes: bytes of each choice, (questions, choices); anything above 0 where a question has no such choice.
        """
        return (self.log_likelihoods / sizes).argmax(-1)


def predict_choices(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    precision: PrecisionSource | AttachedPosterior | None = None,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
) -> ChoicePrediction:
    """Predicts which choice of each question is right, by the likelihood of its tokens behind the question.

    Every sample is drawn once and sees all the data; probabilities over the choices are averaged, not log-likelihoods.
    The model is in evaluation mode meanwhile and unchanged after.

    Args:
        model: gives logits (rows, positions, vocabulary); position t predicts token t + 1.
        batches: mappings of the model's arguments, one row for each choice, with `labels` (the tokens of the choice,
            -100 elsewhere), `choices`, how many rows each question has, in their order, and `answers`, the index of the
            right one of each, or none. They are read once and kept.
        precision: as `attach_posterior` takes it; not needed at the mean.
        samples: S; 0 predicts at the mean.
        temperature: of the samples, on the scale of the data: 1 is the posterior, 0 the mean.
        seed: of the samples.

    Raises:
        EvaluateError: no batches, a question with fewer than two choices, a choice without a target token, answers that
            are no choices, outputs that are no logits.
        NonFiniteError: the model computed NaN.
        NumericalError: an impossible temperature or precision.
        CheckpointError: precisions that do not fit the model; see `attach_posterior`.
    """
    draws = choose_draws(model, precision, samples=samples, temperature=temperature, seed=seed)
    read = [_read(batch) for batch in batches]
    if not read:
        raise EvaluateError("prediction: there are no batches; expected at least one")
    places = _places(torch.cat([batch.counts for batch in read]))
    average, likelihood, uncertainty = LogMean(), LogMean(), Mean()
    with evaluating(model):
        for index in draws.indices:
            with draws.held(index):
                found = torch.cat([row_log_probabilities(model, batch.targets) for batch in read])
            spread = _spread(draws.finite(found, index), places)
            posterior = draws.finite(spread.log_softmax(-1), index)
            average.add(posterior)
            likelihood.add(spread)
            uncertainty.add(entropy(posterior))
    answers = _answers([batch.answers for batch in read], places)
    return ChoicePrediction(
        average.result(),
        uncertainty.result(),
        answers,
        draws.samples,
        draws.temperature,
        seed,
        likelihood.result(),
    )


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some questions with their choices.

    Attributes:
        targets: rows of choices.
        counts: choices of each question, (questions,).
        answers: the right ones, (questions,); None where nobody says.
    """

    targets: Targets
    counts: Tensor
    answers: Tensor | None


def _read(batch: Mapping[str, Any]) -> _Batch:
    if not isinstance(batch, Mapping) or "choices" not in batch:
        raise EvaluateError("prediction: a batch has no `choices`; expected how many rows each of its questions has")
    inputs = {key: value for key, value in batch.items() if key not in ("choices", "answers")}
    counts, targets = batch["choices"].cpu(), targets_of(inputs)
    if counts.min() < 2 or int(counts.sum()) != targets.row_count:
        seen = f"{targets.row_count} rows for {counts.tolist()} choices"
        raise EvaluateError(f"prediction: {seen}; expected two or more for every question, and a row for each")
    empty = int((torch.bincount(targets.rows, minlength=targets.row_count) == 0).sum())
    if empty:
        raise EvaluateError(f"prediction: {empty} choices have no target token; expected one or more for each")
    return _Batch(targets, counts, batch.get("answers"))


def _places(counts: Tensor) -> Tensor:
    """Which choice of a question, if any, is in each place: bool (questions, most choices)."""
    return torch.arange(int(counts.max())) < counts[:, None]


def _spread(values: Tensor, places: Tensor) -> Tensor:
    """Values of all choices behind one another as (questions, choices), -inf where there is none."""
    return torch.full(places.shape, -math.inf, dtype=values.dtype).masked_scatter(places, values)


def _answers(parts: Sequence[Tensor | None], places: Tensor) -> Tensor | None:
    given = [part.cpu() for part in parts if part is not None]
    if not given:
        return None
    answers = torch.cat(given)
    if len(given) < len(parts) or len(answers) != len(places):
        seen = f"{len(answers)} answers for {len(places)} questions"
        raise EvaluateError(f"prediction: {seen}; expected one for each, or none")
    if answers.min() < 0 or (answers >= places.sum(-1)).any():
        seen = f"prediction: answers from {answers.min()} to {answers.max()}"
        raise EvaluateError(f"{seen}; expected indices of choices, counted from 0")
    return answers.long()
