r"""Diagonals of curvature matrices from per-example gradients.

With the signals v_t sent backwards from the places t of a row (`signals`), g = sum_t J_t^T v_t is a gradient of the
row, and

    diagonal = sum over rows of g^2                                               (elementwise)

If v_t has mean zero and is drawn independently at every place, cross terms vanish and E[g^2] = sum_t E[(J_t^T v_t)^2]:
the diagonal of the Fisher information, which is the Gauss-Newton matrix of the cross-entropy, summed over tokens
(Martens 2020, arXiv 1412.1193; as merging weights: Matena & Raffel 2022, arXiv 2111.09832). Squaring the gradient of a
batch would mix examples. With the data's labels cross terms stay: the empirical Fisher of rows, not of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from mergekit_bayes.precision.chunks import Chunk
from mergekit_bayes.precision.estimator import Estimator
from mergekit_bayes.precision.observe import Observation
from mergekit_bayes.precision.targets import Target, count

__all__ = ["EmpiricalFisher", "Fisher", "GaussNewton"]


class _Diagonal(Estimator):
    family = "diagonal"

    @classmethod
    def size(cls, target: Target, options: Mapping[str, object] = MappingProxyType({})) -> int:
        """Returns 4 bytes for every entry."""
        return 4 * count(target)

    def _totals(self) -> Mapping[str, Tensor]:
        return self._squares.totals

    def _curvature(self) -> Mapping[str, Tensor]:
        return self._squares.totals

    def _watched(self) -> Iterable[str]:
        return self._squares.watched

    def _add(self, seen: Observation, chunk: Chunk) -> None:
        self._squares.add(seen, len(chunk))


class Fisher(_Diagonal):
    """The diagonal Fisher information: labels are drawn from the model, one at every place."""

    name = "fisher"
    signal = "sampled_label"


class EmpiricalFisher(_Diagonal):
    """Squared gradients with the labels of the data, summed over rows."""

    name = "empirical_fisher"
    signal = "data_label"


class GaussNewton(_Diagonal):
    """The diagonal Gauss-Newton matrix: as `Fisher` in expectation, with less noise where the model is confident."""

    name = "ggn"
    signal = "random_vector"
