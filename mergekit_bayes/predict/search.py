"""One number of a posterior's width, found on validation data: the search that temperature and prior share.

All candidates scale the same random numbers, so that their losses differ by width and not by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mergekit_bayes.errors import NonFiniteError
from mergekit_bayes.predict.batches import Batch

__all__ = ["Found", "Scored", "search"]

_REFINEMENTS = 6
_FAR = 0.05  # nats
_GOLDEN = (math.sqrt(5) - 1) / 2


class Scored(Protocol):
    """A prediction that knows its losses."""

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihoods, in nats."""


@dataclass(frozen=True)
class Found:
    """The best variance, and all that were tried.

    Attributes:
        best: the one with the lowest loss; 0 is the mean.
        nll: its loss.
        nll_of_mean: that of the mean.
        tried: every variance with its loss, in ascending order; infinite where the model overflowed.
        at_edge: whether it is the highest that was tried.
    """

    best: float
    nll: float
    nll_of_mean: float
    tried: tuple[tuple[float, float], ...]
    at_edge: bool


def search(
    model: nn.Module,
    batches: Sequence[Batch],
    predict: Callable[..., Scored],
    options: Callable[[float], dict[str, Any]],
    candidates: Sequence[float],
) -> Found:
    """Finds the variance with the lowest loss.

    The candidates are tried from the lowest on, until two in turn are far worse than the best; then a golden-section
    search in the square root, the scale of the noise, goes on between the neighbours of the best.

    Args:
        model: holds the mean.
        batches: validation data.
        predict: `predict_probabilities` or `predict_next_tokens`.
        options: keyword arguments of `predict` at a variance; at 0 those of the mean.
        candidates: variances to start with; 0 is always among them.

    Raises:
        NonFiniteError: the model computes NaN at its mean.
    """
    tried: dict[float, float] = {}

    def loss(variance: float) -> float:
        if variance not in tried:
            tried[variance] = _loss(predict, model, batches, options(variance))
        return tried[variance]

    _walk(loss, sorted({0.0, *candidates}))
    if math.isinf(tried[0.0]):
        predict(model, batches)  # raises: the model is at fault, not a variance
    best = _best(tried)
    _refine(loss, *_neighbours(sorted(tried), best))
    best = _best(tried)
    ordered = tuple(sorted(tried.items()))
    return Found(best, tried[best], tried[0.0], ordered, best == ordered[-1][0] > 0)


def _loss(predict: Callable[..., Scored], model: nn.Module, batches: Sequence[Batch], options: dict[str, Any]) -> float:
    try:
        loss = float(predict(model, batches, **options).nll.mean())
    except NonFiniteError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def _walk(loss: Callable[[float], float], ascending: Sequence[float]) -> None:
    lowest, hopeless = math.inf, 0
    for variance in ascending:
        value = loss(variance)
        lowest = min(lowest, value)
        # far worse only: the average of a few samples is not the mean, which at low variances outweighs their spread
        # and can raise the loss before it falls
        hopeless = hopeless + 1 if value > 1.5 * lowest + _FAR else 0
        if hopeless == 2:
            return


def _neighbours(ascending: Sequence[float], best: float) -> tuple[float, float]:
    place = ascending.index(best)
    return ascending[max(place - 1, 0)], ascending[min(place + 1, len(ascending) - 1)]


def _refine(loss: Callable[[float], float], low: float, high: float) -> None:
    start, end = math.sqrt(low), math.sqrt(high)
    inner = [end - _GOLDEN * (end - start), start + _GOLDEN * (end - start)]
    for _ in range(_REFINEMENTS if end > start else 0):
        if loss(inner[0] ** 2) < loss(inner[1] ** 2):
            end, inner = inner[1], [inner[1] - _GOLDEN * (inner[1] - start), inner[0]]
        else:
            start, inner = inner[0], [inner[1], inner[0] + _GOLDEN * (end - inner[0])]


def _best(tried: dict[float, float]) -> float:
    return min(sorted(tried), key=lambda variance: tried[variance])
