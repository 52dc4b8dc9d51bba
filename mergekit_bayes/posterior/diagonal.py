"""Gaussians with one precision per entry: what IVON, diagonal Fisher and squared gradients provide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from mergekit_bayes.errors import ShapeMismatchError
from mergekit_bayes.posterior.elementwise import Elementwise

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Diagonal"]


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Diagonal(Elementwise):
    """q(w) = N(mean, diag(1 / precision)).

    Args:
        mean: posterior mean, shape (*weight), finite floating point.
        precision: inverse variance at data scale (loss summed over the training units, prior included once),
            shape, dtype and device of the mean; finite, positive.

    Raises:
        ShapeMismatchError: mean and precision differ in shape, dtype or device.
        NonFiniteError: NaN or infinity.
        NonPositivePrecisionError: a precision of zero or below.
    """

    mean: Tensor
    precision: Tensor
    family: ClassVar[str] = "diagonal"
    richness: ClassVar[int] = 1

    def __init__(self, mean: Tensor, precision: Tensor) -> None:
        self._set(mean, precision)
        self.check()

    def _set(self, mean: Tensor, precision: Tensor) -> None:
        if precision.shape != mean.shape:
            raise ShapeMismatchError(
                f"diagonal posterior: mean of shape {tuple(mean.shape)}, precision {tuple(precision.shape)}"
            )
        super()._set(mean, precision)
