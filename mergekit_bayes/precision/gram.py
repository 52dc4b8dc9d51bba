"""Second moments of the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from mergekit_bayes.precision.chunks import Chunk
from mergekit_bayes.precision.estimator import Estimator
from mergekit_bayes.precision.moments import Moments
from mergekit_bayes.precision.observe import Observation
from mergekit_bayes.precision.targets import Layer, Target, Targets, factored_only

__all__ = ["Gram"]


class Gram(Estimator):
    r"""Sums of x x^T over the inputs of linear layers: the curvature of 0.5 ||W x - W_t x||^2 in W.

        H = I (x) A,     A = sum over places of x x^T

    (RegMean: Jin et al. 2023, arXiv 2212.09849.) A place is a token that some loss of its row depends on: padding is
    left out, and in a language model what comes after the last predicted token; tokens of a prompt count, as later
    ones see them through this layer. No gradients are needed. Whatever has no input factor is not described.
    """

    name = "gram"
    family = "kronecker"
    signal = None

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        seed: int = 0,
        chunk_size: int = 8,
        options: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        super().__init__(model, factored_only(targets), seed=seed, chunk_size=chunk_size, options=options)
        self._moments = Moments(model, self.targets.layers, sides=("input",))

    @classmethod
    def size(cls, target: Target, options: Mapping[str, object] = MappingProxyType({})) -> int:
        """Returns 4 bytes for every entry of a layer's factor."""
        return 4 * target.in_features**2 if isinstance(target, Layer) and target.factored else 0

    def _totals(self) -> Mapping[str, Tensor]:
        return self._moments.totals

    def _curvature(self) -> Mapping[str, Tensor]:
        return {name: value[None] for name, value in self._moments.totals.items() if not name.endswith(".places")}

    def _watched(self) -> Iterable[str]:
        return (layer.path for layer in self.targets.layers)

    def _add(self, seen: Observation, chunk: Chunk) -> None:
        self._moments.add(seen.uses, chunk)
