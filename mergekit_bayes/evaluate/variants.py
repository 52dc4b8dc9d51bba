"""The ways a model is looked at: its mean, averaged over samples of its posterior, or pruned by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

from torch import nn

from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.predict.attach import AttachedPosterior
from mergekit_bayes.predict.pruning import prune_posterior
from mergekit_bayes.recipe.evaluate import EvaluateRecipe

__all__ = ["Variant", "variants_of"]

_BLOCKS, _SAMPLED_BLOCKS = 64, 16  # every block draws all samples anew


@dataclass(frozen=True)
class Variant:
    """One way.

    Attributes:
        samples: how many are averaged; 0 for the mean.
        temperature: of the samples; None where validation data will say.
        prune: share of the weights that are zero.
        prior: S_0 of the samples; None for what the precisions have.
    """

    samples: int = 0
    temperature: float | None = 0.0
    prune: float = 0.0
    prior: float | None = None

    def title(self, model: str) -> str:
        """What tables call a model looked at this way."""
        if self.samples:
            return f"{model} ({self.samples} samples)"
        return f"{model} (pruned {self.prune:g})" if self.prune else model

    @property
    def blocks(self) -> int:
        """Into how many blocks rows are cut at most."""
        return _SAMPLED_BLOCKS if self.samples else _BLOCKS

    @property
    def identity(self) -> Mapping[str, object]:
        """What its numbers depend on."""
        return asdict(self)

    def applied(self, model: nn.Module, posterior: AttachedPosterior | None) -> AbstractContextManager[object]:
        """The context in which the model is as this way wants it."""
        if not self.prune:
            return nullcontext()
        assert posterior is not None  # candidates without precisions were refused
        return prune_posterior(model, posterior, self.prune)


def variants_of(recipe: EvaluateRecipe, candidate: Candidate) -> Iterator[Variant]:
    """Yields the ways a model is looked at, its mean first."""
    yield Variant()
    asked = candidate.samples
    if asked is not None:
        chosen = asked.temperature == "validation"
        yield Variant(asked.count, None if chosen else float(asked.temperature), prior=asked.prior)
    for share in recipe.prune:
        yield Variant(prune=share)
