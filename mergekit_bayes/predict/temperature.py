"""The temperature at which samples predict best, found on validation data.

A posterior at data scale can be too wide for a network: the approximation ignores correlations between weights, and a
short run leaves a precision that is mostly its initial value. The temperature is one number that can be chosen after
training (Shen et al. 2024, arXiv 2402.17641; Wenzel et al. 2020, arXiv 2002.02405, on why it is often below 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict.attach import AttachedPosterior, attach_posterior
from mergekit_bayes.predict.batches import Batch
from mergekit_bayes.predict.classes import predict_probabilities
from mergekit_bayes.predict.precisions import PrecisionSource
from mergekit_bayes.predict.sampling import check_temperature
from mergekit_bayes.predict.search import Scored, search

__all__ = ["ChosenTemperature", "choose_temperature"]

_CANDIDATES = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


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
    predict: Callable[..., Scored] = predict_probabilities,
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
    posterior = attach_posterior(model, precision)

    def options(temperature: float) -> dict[str, Any]:
        return {"precision": posterior, "samples": samples, "temperature": temperature, "seed": seed}

    found = search(model, list(batches), predict, options, candidates)
    return ChosenTemperature(found.best, found.nll, found.nll_of_mean, found.tried, found.at_edge)
