"""What a model says of a block of rows, as numbers per row: all that scores are made of, and all that is remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mergekit_bayes.data import Rows
from mergekit_bayes.predict.attach import AttachedPosterior
from mergekit_bayes.predict.classes import predict_probabilities
from mergekit_bayes.predict.rows import Feed
from mergekit_bayes.predict.tokens import predict_next_tokens

__all__ = ["Measured", "measure_block", "predictor"]

Measured = Mapping[int, Sequence[float]]
"""By row. Of a language model: nats of all targets together. Of a classifier: log-probability of every class."""


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
    measure = _tokens if feed.rows.task == "causal_lm" else _classes
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


def predictor(rows: Rows) -> Any:
    """The function that predicts for rows of this task."""
    return predict_next_tokens if rows.task == "causal_lm" else predict_probabilities
