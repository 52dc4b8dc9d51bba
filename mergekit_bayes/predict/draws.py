"""Which weights a prediction averages over: the mean alone, or samples of the posterior."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError, NonFiniteError
from mergekit_bayes.predict.attach import AttachedPosterior, attach_posterior
from mergekit_bayes.predict.precisions import PrecisionSource
from mergekit_bayes.predict.sampling import check_temperature, sample_posterior

__all__ = ["Draws", "choose_draws"]


@dataclass(frozen=True, eq=False)
class Draws:
    """The weights to average over.

    Attributes:
        model: holds the mean.
        posterior: attached to the model; None at the mean.
        samples: how many; 0 at the mean.
        temperature: of the samples.
        seed: of the samples.
    """

    model: nn.Module
    posterior: AttachedPosterior | None
    samples: int
    temperature: float
    seed: int

    @property
    def indices(self) -> Sequence[int]:
        """One index per set of weights."""
        return range(max(self.samples, 1))

    def held(self, index: int) -> AbstractContextManager[object]:
        """The context in which the model holds the weights of this index."""
        if self.posterior is None:
            return nullcontext()
        return sample_posterior(self.model, self.posterior, sample=index, temperature=self.temperature, seed=self.seed)

    def finite(self, log_probabilities: Tensor, index: int) -> Tensor:
        """Returns what it is given, if these are logarithms of probabilities; of 0 too.

        Raises:
            NonFiniteError: the model computed NaN or infinity.
        """
        if not torch.isnan(log_probabilities).any():
            return log_probabilities
        if self.posterior is None:
            raise NonFiniteError("prediction: the model gives NaN or infinity at its mean")
        seen = f"prediction: sample {index} at temperature {self.temperature:g} gives NaN or infinity"
        raise NonFiniteError(f"{seen}; expected a lower temperature, or a posterior that is less wide")


def choose_draws(
    model: nn.Module,
    precision: PrecisionSource | AttachedPosterior | None,
    *,
    samples: int,
    temperature: float,
    seed: int,
) -> Draws:
    """Attaches the posterior where there is something to sample.

    Raises:
        EvaluateError: a negative number of samples, or samples without precisions.
        NumericalError: a temperature that is negative or not finite.
        CheckpointError: the precisions do not fit the model; see `attach_posterior`.
    """
    check_temperature(temperature)
    if samples < 0:
        raise EvaluateError(f"prediction: samples is {samples}; expected 0 (the mean) or more")
    if samples and precision is None:
        raise EvaluateError(f"prediction: {samples} samples without precisions; expected a sidecar, or samples=0")
    if samples == 0 or temperature == 0 or precision is None:
        return Draws(model, None, 0, 0.0, seed)
    return Draws(model, attach_posterior(model, precision), samples, temperature, seed)
