"""What a model says of a block of rows, as numbers per row: all that scores are made of, and all that is remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.data import Rows, Task
from mergekit_bayes.predict.attach import AttachedPosterior
from mergekit_bayes.predict.choices import predict_choices
from mergekit_bayes.predict.classes import predict_probabilities
from mergekit_bayes.predict.rows import Feed
from mergekit_bayes.predict.tokens import predict_next_tokens

__all__ = ["Measured", "measure_block", "predictor"]

Measured = Mapping[int, Sequence[float]]
"""By row. Of a language model: nats of all targets together. Of a classifier: log-probability of every class. Of a
question: log-probability of every choice, then log-likelihood of every choice."""


def measure_block(
    model: nn.Module, feed: Feed, block: Sequence[Sequence[int]], posterior: AttachedPosterior | None, **draws: Any
) -> Measured:
    """Evaluates some batches.

    Args:
        model: holds the mean.
        feed: of the rows.
        block: batches of row indices.
        posterior: of the model, to sample; None for its mean.
        draws: `samples`, `temperature` and `seed`, as `predict_probabilities` takes them.

    Raises:
        NonFiniteError: the model computed NaN.
    """
    batches = [feed.batch(indices) for indices in block]
    order = [index for indices in block for index in indices]
    measure = _MEASURES[feed.rows.task]
    return dict(zip(order, measure(model, batches, posterior, draws, len(order)), strict=True))


def _tokens(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    posterior: AttachedPosterior | None,
    draws: Mapping[str, Any],
    count: int,
) -> list[list[float]]:
    found = predict_next_tokens(model, batches, posterior, **draws)
    nats = found.nll.new_zeros(count).index_add(0, found.rows, found.nll)
    return [[value] for value in nats.tolist()]


def _classes(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    posterior: AttachedPosterior | None,
    draws: Mapping[str, Any],
    count: int,
) -> list[list[float]]:
    found: list[list[float]] = predict_probabilities(model, batches, posterior, **draws).log_probabilities.tolist()
    return found


def _choices(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    posterior: AttachedPosterior | None,
    draws: Mapping[str, Any],
    count: int,
) -> list[list[float]]:
    found = predict_choices(model, batches, posterior, **draws)
    counts = torch.cat([batch["choices"] for batch in batches]).tolist()
    both = zip(counts, found.log_probabilities.tolist(), found.log_likelihoods.tolist(), strict=True)
    return [[*probabilities[:n], *likelihoods[:n]] for n, probabilities, likelihoods in both]


_MEASURES = {"causal_lm": _tokens, "sequence_classification": _classes, "multiple_choice": _choices}
_PREDICTORS: Mapping[Task, Any] = {
    "causal_lm": predict_next_tokens,
    "sequence_classification": predict_probabilities,
    "multiple_choice": predict_choices,
}


def predictor(rows: Rows) -> Any:
    """The function that predicts for rows of this task."""
    return _PREDICTORS[rows.task]
