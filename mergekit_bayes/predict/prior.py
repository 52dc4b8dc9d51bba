r"""Another prior under the same curvature: how sure a posterior is where the data say nothing.

    S = H + S_0

H is the curvature of the data, S_0 the prior precision, one number. Where H vanishes, and of the updates of an adapter
it does so in most directions, samples are as wide as the prior lets them be; training with a weight decay of 1e-8 says
nothing about that. S_0 can be chosen afterwards (Daxberger et al. 2021, arXiv 2106.14806, section 3.3; for LoRA Yang et
al. 2024, arXiv 2308.13111): by validation data here, at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.posterior import Kronecker
from mergekit_bayes.posterior.eigenbasis import spectrum
from mergekit_bayes.posterior.term import combined
from mergekit_bayes.predict.attach import AttachedPosterior, Weight, attach_posterior
from mergekit_bayes.predict.batches import Batch
from mergekit_bayes.predict.classes import predict_probabilities
from mergekit_bayes.predict.precisions import PrecisionSource
from mergekit_bayes.predict.search import Scored, search

__all__ = ["ChosenPrior", "choose_prior", "with_prior"]

_CANDIDATES = (1e6, 1e5, 1e4, 1e3, 100.0, 10.0, 1.0)


@dataclass(frozen=True)
class ChosenPrior:
    """A prior precision and how it was found.

    Attributes:
        prior: S_0 with the lowest loss; infinite if no samples beat the mean.
        nll: average negative log-likelihood of the validation data there, nats per example or token.
        nll_of_mean: the same at the mean.
        tried: every S_0 with its loss, in descending order; the loss is infinite where the model overflowed.
        at_edge: whether it is the lowest that was tried, so that a lower one may be better.
    """

    prior: float
    nll: float
    nll_of_mean: float
    tried: tuple[tuple[float, float], ...]
    at_edge: bool


def with_prior(posterior: AttachedPosterior, prior: float) -> AttachedPosterior:
    """The posterior that the same data leave under another prior.

    Args:
        posterior: attached, with the prior precision that its sidecar records.
        prior: S_0 at data scale, for all weights.

    Raises:
        EvaluateError: the prior in the precisions is not known, or `prior` is not positive and finite.
    """
    _check_positive(prior)
    if posterior.prior is None:
        raise EvaluateError(
            "prior: the precisions do not say which prior is in them; expected a sidecar that records its "
            "prior_precision"
        )
    weights = tuple(_exchanged(weight, posterior.prior, prior) for weight in posterior.weights)
    return replace(posterior, weights=weights, prior=prior)


def choose_prior(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: PrecisionSource | AttachedPosterior,
    *,
    predict: Callable[..., Scored] = predict_probabilities,
    samples: int = 8,
    seed: int = 0,
    candidates: Sequence[float] = _CANDIDATES,
) -> ChosenPrior:
    """Chooses the prior precision with the lowest loss of the averaged prediction at temperature 1.

    All use the same random numbers. The candidates are tried from the highest on, which leaves next to nothing but the
    mean, until two in turn are far worse than the best; then a golden-section search goes on between the neighbours of
    the best.

    Args:
        model: holds the mean.
        batches: validation data with labels, as `choose_temperature` takes them.
        precision: as `attach_posterior` takes it, with a known prior.
        predict: `predict_probabilities` or `predict_next_tokens`.
        samples: per candidate.
        seed: of the samples.
        candidates: prior precisions to start with.

    Raises:
        EvaluateError: no candidates or no samples, one that is not positive, no known prior; and whatever `predict`
            refuses.
        NonFiniteError: the model computes NaN at its mean.
    """
    if samples < 1 or not candidates:
        raise EvaluateError(f"prior: {samples} samples, {len(candidates)} candidates; expected one or more of each")
    for candidate in candidates:
        _check_positive(candidate)
    attached = attach_posterior(model, precision)
    kept = list(batches)
    # the first exchange finds eigenvectors, of which the others make use
    start = with_prior(attached, attached.prior if attached.prior else 1.0)

    def options(variance: float) -> dict[str, Any]:
        if variance == 0:
            return {"precision": start, "samples": samples, "temperature": 0.0, "seed": seed}
        return {"precision": with_prior(start, 1 / variance), "samples": samples, "temperature": 1.0, "seed": seed}

    found = search(model, kept, predict, options, [1 / candidate for candidate in candidates])
    tried = tuple((math.inf if not variance else 1 / variance, loss) for variance, loss in found.tried)
    prior = 1 / found.best if found.best else math.inf
    return ChosenPrior(prior, found.nll, found.nll_of_mean, tried, found.at_edge)


def _check_positive(prior: float) -> None:
    if not 0 < prior < math.inf:
        raise EvaluateError(f"prior: S_0 is {prior}; expected a positive number")


def _exchanged(weight: Weight, old: float, new: float) -> Weight:
    spread = weight.spread
    if not isinstance(spread, Kronecker):
        return replace(weight, spread=_shifted(spread, old, new))
    diagonal = _shifted(spread.diagonal, old, new)
    terms = combined(spread.terms)
    if len(terms) == 1 and terms[0].eigenvalues is None:
        eigen = spectrum(diagonal.new_zeros(()), terms, len(spread.mean))
        assert eigen is not None  # one term beside one number
        terms = (eigen,)
    return replace(weight, spread=Kronecker.unchecked(spread.mean, diagonal, terms))


def _shifted(precision: Tensor, old: float, new: float) -> Tensor:
    """Another prior beside the same curvature; what rounding left below the old one is a curvature of zero."""
    return ((precision.double() - old).clamp_(min=0) + new).to(precision.dtype)
