"""The temperature at which samples predict best, found on validation data.

A posterior at data scale can be too wide for a network: the approximation ignores correlations between weights, and a
short run leaves a precision that is mostly its initial value. The temperature is one number that can be chosen after
training (Shen et al. 2024, arXiv 2402.17641; Wenzel et al. 2020, arXiv 2002.02405, on why it is often below 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError, NonFiniteError
from mergekit_bayes.predict.attach import AttachedPosterior, attach_posterior
from mergekit_bayes.predict.batches import Batch
from mergekit_bayes.predict.classes import predict_probabilities
from mergekit_bayes.predict.precisions import PrecisionSource
from mergekit_bayes.predict.sampling import check_temperature

__all__ = ["ChosenTemperature", "choose_temperature"]

_CANDIDATES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
_REFINEMENTS = 6
_FAR = 0.05  # nats
_GOLDEN = (math.sqrt(5) - 1) / 2


class _Scored(Protocol):
    @property
    def nll(self) -> Tensor: ...


@dataclass(frozen=True)
class ChosenTemperature:
    """A temperature and how it was found.

    Attributes:
        temperature: the one with the lowest loss; 0 if no samples beat the mean.
        nll: average negative log-likelihood of the validation data there, nats per example or token.
        nll_of_mean: the same at the mean.
        tried: every temperature with its loss, in ascending order; infinite where the model overflowed.
        at_edge: whether it is the highest that was tried, so that a higher one may be better.
    """

    temperature: float
    nll: float
    nll_of_mean: float
    tried: tuple[tuple[float, float], ...]
    at_edge: bool


def choose_temperature(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: PrecisionSource | AttachedPosterior,
    *,
    predict: Callable[..., _Scored] = predict_probabilities,
    samples: int = 8,
    seed: int = 0,
    candidates: Sequence[float] = _CANDIDATES,
) -> ChosenTemperature:
    """Chooses the temperature with the lowest loss of the averaged prediction.

    All temperatures scale the same random numbers, so that their losses differ by temperature and not by luck. The
    candidates are tried from the lowest on, until two in turn are far worse than the best; then a golden-section search
    in sqrt(temperature), the scale of the noise, goes on between the neighbours of the best.

    Args:
        model: holds the mean.
        batches: validation data with labels: not what was trained on, where samples hardly ever help, and not what
            will be reported.
        precision: as `attach_posterior` takes it.
        predict: `predict_probabilities` or `predict_next_tokens`; with other options bound by functools.partial.
        samples: per temperature.
        seed: of the samples; predict with it afterwards to have those the temperature was chosen for.
        candidates: temperatures to start with; 0, the mean, is always among them.

    Raises:
        EvaluateError: no candidates or no samples; and whatever `predict` refuses.
        NumericalError: a candidate that is negative or not finite.
        NonFiniteError: the model computes NaN at its mean.
    """
    if samples < 1 or not candidates:
        raise EvaluateError(
            f"temperature: {samples} samples, {len(candidates)} candidates; expected one or more of each"
        )
    for candidate in candidates:
        check_temperature(candidate)
    kept, posterior = list(batches), attach_posterior(model, precision)
    tried: dict[float, float] = {}

    def loss(temperature: float) -> float:
        if temperature not in tried:
            options: dict[str, Any] = {"samples": samples, "temperature": temperature, "seed": seed}
            tried[temperature] = _loss(predict, model, kept, posterior, options)
        return tried[temperature]

    _walk(loss, sorted({0.0, *candidates}))
    if math.isinf(tried[0.0]):
        predict(model, kept)  # raises: the model is at fault, not a temperature
    best = _best(tried)
    _refine(loss, *_neighbours(sorted(tried), best))
    best = _best(tried)
    ordered = tuple(sorted(tried.items()))
    return ChosenTemperature(best, tried[best], tried[0.0], ordered, best == ordered[-1][0] > 0)


def _loss(
    predict: Callable[..., _Scored],
    model: nn.Module,
    batches: Sequence[Batch],
    posterior: AttachedPosterior,
    options: dict[str, Any],
) -> float:
    try:
        loss = float(predict(model, batches, posterior, **options).nll.mean())
    except NonFiniteError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def _walk(loss: Callable[[float], float], ascending: Sequence[float]) -> None:
    lowest, hopeless = math.inf, 0
    for temperature in ascending:
        value = loss(temperature)
        lowest = min(lowest, value)
        # far worse only: the average of a few samples is not the mean, which at low temperatures outweighs their spread
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
    return min(sorted(tried), key=lambda temperature: tried[temperature])
