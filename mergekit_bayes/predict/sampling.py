r"""Samples of a model: its weights replaced by a draw from their posterior for as long as a context lasts.

    theta = m + sqrt(T / S) z,    z ~ N(0, 1)

with m the mean that the model holds, S the precision at data scale and T the temperature; a matrix S with Kronecker
terms takes S^-1/2 z instead (see `Kronecker.sample`). T = 1 is the posterior, T = 0 the mean; training with IVON
sampled at T = N / ess. Of a LoRA adapter the factors A and B are sampled, each entry on its own, or with precisions
in product space its updates dW: their deviation is added to the base's weights for as long as the context lasts.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from weakref import WeakSet

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError, NumericalError
from mergekit_bayes.posterior import Kronecker
from mergekit_bayes.predict.attach import AttachedPosterior, Weight, attach_posterior
from mergekit_bayes.predict.names import check_adapter
from mergekit_bayes.predict.precisions import PrecisionSource

__all__ = ["check_temperature", "sample_posterior"]

_sampled: WeakSet[nn.Module] = WeakSet()  # models that hold a sample at this moment


@contextmanager
def sample_posterior(
    model: nn.Module,
    precision: PrecisionSource | AttachedPosterior,
    *,
    sample: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[AttachedPosterior]:
    """The model holds a sample of its posterior inside, and its mean again, bit for bit, after, also on an exception.

    A sample depends on (seed, sample, name of the weight) and on nothing else, on one kind of device: not on the
    order of weights, on which other weights are sampled, or on where a model is split. Temperatures scale the same
    numbers. The global generators are left alone. Needs memory for one more copy of the sampled weights; the first
    sample of weights with Kronecker terms finds eigenvectors, which take time and as much memory as the factors.

    Args:
        model: any module that holds its mean.
        precision: as `attach_posterior` takes it, or what it returned.
        sample: which sample, 0 or more.
        temperature: of the variance, 0 or more; 0 is the mean.
        seed: of all samples.

    Yields:
        The posterior, attached, for use with further samples.

    Raises:
        EvaluateError: the model holds a sample already; a negative sample.
        NumericalError: a temperature that is negative, not finite, or too high for a precision; Kronecker terms that
            leave a precision that is not positive definite.
        CheckpointError: the precisions do not fit the model; see `attach_posterior`.
    """
    posterior = attach_posterior(model, precision)
    check_temperature(temperature)
    if sample < 0:
        raise EvaluateError(f"sample of a posterior: sample is {sample}; expected 0 or more")
    if posterior.model in _sampled:
        raise EvaluateError("sample of a posterior: the model holds a sample already; expected its mean")
    check_adapter(posterior.model, posterior.adapter)
    means: list[tuple[nn.Parameter, Tensor]] = []
    _sampled.add(posterior.model)
    try:
        if temperature > 0:
            noise = _Noise(seed, sample)
            for weight in posterior.weights:
                means.append((weight.parameter, weight.parameter.detach().clone()))
                _perturb(weight, noise, temperature)
        yield posterior
    finally:
        with torch.no_grad():
            for parameter, mean in means:
                parameter.copy_(mean)
        _sampled.discard(posterior.model)


def check_temperature(temperature: float) -> None:
    """Checks a temperature.

    Raises:
        NumericalError: it is negative or not finite.
    """
    if not 0 <= temperature < math.inf:
        raise NumericalError(f"temperature is {temperature}; it must be finite and at least 0")


@torch.no_grad()
def _perturb(weight: Weight, noise: _Noise, temperature: float) -> None:
    parameter = weight.parameter
    # in float32 at least: what a bfloat16 weight holds is the rounded sample, not a sum of rounded terms
    wide = torch.promote_types(parameter.dtype, torch.float32)
    if isinstance(weight.spread, Kronecker):
        draw = _correlated(weight, weight.spread, noise.generator(weight)).mul_(temperature**0.5)
        _check_finite(draw, weight, temperature)
    else:
        deviation = (temperature / weight.spread.to(parameter.device)).sqrt()
        _check_finite(deviation, weight, temperature)
        draw = noise.normal(weight).to(wide).mul_(deviation.to(wide))
    parameter.copy_(draw.add_(parameter))


def _correlated(weight: Weight, spread: Kronecker, generator: torch.Generator) -> Tensor:
    try:
        draw = spread.sample(generator)
    except NumericalError as error:
        raise type(error)(f"sample of {weight.name}: {error}") from None
    return draw.mT if weight.turned else draw


def _check_finite(values: Tensor, weight: Weight, temperature: float) -> None:
    if not values.isfinite().all():
        lowest = float(weight.precision.min())
        seen = f"sample of {weight.name}: precision {lowest:.3g} at temperature {temperature:g} has no finite variance"
        raise NumericalError(f"{seen}; expected a lower temperature")


class _Noise:
    """Standard normal numbers for every weight of one sample."""

    def __init__(self, seed: int, sample: int) -> None:
        self._key = struct.pack("<2q", seed, sample)
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, weight: Weight) -> torch.Generator:
        device = weight.parameter.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        generator = self._generators[device]
        # `person` keeps these numbers apart from those that training drew with the same seed
        digest = blake2b(self._key + weight.name.encode(), digest_size=8, person=b"predict").digest()
        return generator.manual_seed(int.from_bytes(digest, "little") >> 1)

    def normal(self, weight: Weight) -> Tensor:
        shape, device = weight.parameter.shape, weight.parameter.device
        return torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=self.generator(weight))
