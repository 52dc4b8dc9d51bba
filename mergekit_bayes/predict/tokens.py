"""What a language model predicts for the next token, at its mean or averaged over samples of its posterior."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict.attach import AttachedPosterior
from mergekit_bayes.predict.average import LogMean, Mean, entropy
from mergekit_bayes.predict.batches import Batch, evaluating, labels_of, logits_of, to_device
from mergekit_bayes.predict.draws import Draws, choose_draws
from mergekit_bayes.predict.precisions import PrecisionSource

__all__ = [
    "Targets",
    "TokenPrediction",
    "VocabularyPrediction",
    "predict_next_tokens",
    "row_log_probabilities",
    "targets_of",
]

_IGNORED = -100  # label of positions that are not predicted, by the convention of transformers
_CHUNK = 1 << 24  # logits brought to float32 at once


@dataclass(frozen=True, eq=False)
class VocabularyPrediction:
    """What takes the whole vocabulary to know, for every target token, of the averaged probabilities; on the CPU.

    Attributes:
        entropy: of the averaged probabilities, nats, (tokens,).
        expected_entropy: average over samples of the entropy of one sample's probabilities, nats, (tokens,).
        confidence: probability of the most probable token, (tokens,).
        correct: whether that is the target, bool, (tokens,).
    """

    entropy: Tensor
    expected_entropy: Tensor
    confidence: Tensor
    correct: Tensor

    @property
    def mutual_information(self) -> Tensor:
        """Entropy minus expected entropy, nats, (tokens,): what knowing the weights would tell; 0 at the mean."""
        return (self.entropy - self.expected_entropy).clamp(min=0)


@dataclass(frozen=True, eq=False)
class TokenPrediction:
    """Probabilities of target tokens, averaged over samples; float64 on the CPU, in the order of the batches.

    Attributes:
        log_probabilities: logarithm of the averaged probability of each target token given those before it, (tokens,).
        rows: the row each token belongs to, (tokens,).
        row_log_probabilities: logarithm of the averaged probability of all targets of a row together, (rows,). Not
            the sum over its tokens: here one sample predicts the whole row, there each token is averaged on its own.
        vocabulary: entropies and best tokens; None unless asked for.
        samples: how many were averaged; 0 is the mean of the posterior.
        temperature: of the samples.
        seed: of the samples.
    """

    log_probabilities: Tensor
    rows: Tensor
    row_log_probabilities: Tensor
    vocabulary: VocabularyPrediction | None
    samples: int
    temperature: float
    seed: int

    @property
    def nll(self) -> Tensor:
        """Minus the log-probability of each target token, nats, (tokens,); its mean is the loss of training."""
        return -self.log_probabilities


def predict_next_tokens(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: PrecisionSource | AttachedPosterior | None = None,
    *,
    samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    vocabulary: bool = False,
) -> TokenPrediction:
    """Predicts target tokens, p(x_t | x_<t) = (1/S) sum_s p(x_t | x_<t, theta_s), theta_s from the posterior.

    Every sample is drawn once and sees all the data, and of its logits only the targets' probabilities are kept. With
    `vocabulary` the average over all tokens is needed, one batch at a time: samples are drawn again for every batch.
    The model is in evaluation mode meanwhile and unchanged after.

    Args:
        model: gives logits (rows, positions, vocabulary); position t predicts token t + 1.
        batches: mappings of the model's arguments with `labels`: the tokens themselves, -100 where none is predicted;
            or pairs (inputs, labels). They are read once and kept.
        precision: as `attach_posterior` takes it; not needed at the mean.
        samples: S; 0 predicts at the mean.
        temperature: of the samples, on the scale of the data: 1 is the posterior, 0 the mean.
        seed: of the samples.
        vocabulary: also compute entropies and the most probable token.

    Raises:
        EvaluateError: no batches, none with a target, no labels, outputs that are no logits.
        NonFiniteError: the model computed NaN.
        NumericalError: an impossible temperature or precision.
        CheckpointError: precisions that do not fit the model; see `attach_posterior`.
    """
    draws = choose_draws(model, precision, samples=samples, temperature=temperature, seed=seed)
    read = [targets_of(batch) for batch in batches]
    starts = torch.tensor([0, *(batch.row_count for batch in read)]).cumsum(0)
    rows = torch.cat([batch.rows + start for batch, start in zip(read, starts, strict=False)]) if read else starts[1:]
    if not len(rows):
        raise EvaluateError("prediction: no batch has a target token; expected labels other than -100 after the first")
    with evaluating(model):
        tokens, joint, whole = _by_batch(draws, read) if vocabulary else _by_sample(draws, read)
    return TokenPrediction(tokens, rows, joint, whole, draws.samples, draws.temperature, seed)


@dataclass(frozen=True, eq=False)
class Targets:
    """A batch, and the tokens in it to predict.

    Attributes:
        inputs: arguments of the model.
        places: where the next token is a target, bool, (rows, positions - 1).
        tokens: the targets, (tokens,).
        rows: the row each belongs to, counted within the batch, (tokens,).
    """

    inputs: Any
    places: Tensor
    tokens: Tensor
    rows: Tensor

    @property
    def row_count(self) -> int:
        """Rows of the batch, with targets or without."""
        return len(self.places)

    def row_sums(self, log_probabilities: Tensor) -> Tensor:
        """Sums over the targets of each row, (rows,)."""
        return log_probabilities.new_zeros(self.row_count).index_add(0, self.rows, log_probabilities)


def targets_of(batch: Batch) -> Targets:
    """Finds the tokens of a batch that are predicted.

    Raises:
        EvaluateError: the batch has no labels of tokens.
    """
    inputs, labels = labels_of(batch)
    if labels is None or labels.dim() != 2:
        seen = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
        raise EvaluateError(f"prediction: a batch has {seen}; expected (rows, positions) of tokens, -100 for none")
    following = labels[:, 1:].cpu()
    places = following != _IGNORED
    rows = torch.arange(len(labels))[:, None].expand_as(places)[places]
    return Targets(inputs, places, following[places], rows)


def row_log_probabilities(model: nn.Module, batch: Targets) -> Tensor:
    """Log-probability of all targets of a row together, nats, (rows,), float64 on the CPU.

    Raises:
        EvaluateError: outputs that are no logits.
    """
    return batch.row_sums(_log_probabilities(_logits(model, batch), batch.tokens))


def _by_sample(draws: Draws, read: Sequence[Targets]) -> tuple[Tensor, Tensor, None]:
    tokens, joint = LogMean(), LogMean()
    for index in draws.indices:
        with draws.held(index):
            found = [_log_probabilities(_logits(draws.model, batch), batch.tokens) for batch in read]
        tokens.add(draws.finite(torch.cat(found), index))
        joint.add(torch.cat([batch.row_sums(part) for batch, part in zip(read, found, strict=True)]))
    return tokens.result(), joint.result(), None


def _by_batch(draws: Draws, read: Sequence[Targets]) -> tuple[Tensor, Tensor, VocabularyPrediction]:
    columns = zip(*(_whole(draws, batch) for batch in read), strict=True)
    tokens, joint, entropies, expected, confidence, correct = (torch.cat(column) for column in columns)
    return tokens, joint, VocabularyPrediction(entropies, expected, confidence, correct)


def _whole(draws: Draws, batch: Targets) -> tuple[Tensor, ...]:
    tokens, joint, average, uncertainty = LogMean(), LogMean(), LogMean(), Mean()
    for index in draws.indices:
        with draws.held(index):
            logits = _logits(draws.model, batch)
        found = draws.finite(_log_probabilities(logits, batch.tokens), index)
        tokens.add(found)
        joint.add(batch.row_sums(found))
        distributions = logits.float().log_softmax(-1)
        average.add(distributions)
        uncertainty.add(entropy(distributions))
    best = average.result().max(-1)
    uncertain = (entropy(average.result()), uncertainty.result(), best.values.exp())
    correct = best.indices.cpu() == batch.tokens
    return tokens.result(), joint.result(), *(column.cpu().double() for column in uncertain), correct


def _logits(model: nn.Module, batch: Targets) -> Tensor:
    """Logits of the positions before a target, (tokens, vocabulary)."""
    inputs = to_device(batch.inputs, model)
    if isinstance(inputs, dict) and hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False  # keys and values of positions that nobody continues
    logits = logits_of(model, inputs)
    positions = batch.places.shape[1] + 1
    if logits.dim() != 3 or logits.shape[:2] != (batch.row_count, positions):
        expected = f"({batch.row_count}, {positions}, vocabulary), for labels of ({batch.row_count}, {positions})"
        raise EvaluateError(f"prediction: the logits have shape {tuple(logits.shape)}; expected {expected}")
    return logits[:, :-1][batch.places.to(logits.device)]


def _log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each target, float64 on the CPU."""
    rows = max(1, _CHUNK // logits.shape[1])
    targets = tokens.to(logits.device)[:, None]
    found = [torch.empty(0, dtype=torch.float64)]
    for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        found.append(part.float().log_softmax(-1).gather(1, target)[:, 0].cpu().double())
    return torch.cat(found)
