"""Gaussians with one precision for the whole tensor: what plain averaging and task arithmetic assume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from mergekit_bayes.errors import ShapeMismatchError
from mergekit_bayes.posterior.elementwise import Elementwise

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Isotropic"]


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Isotropic(Elementwise):
    """q(w) = N(mean, I / precision).

    Args:
        mean: posterior mean, shape (*weight), finite floating point.
        precision: inverse variance at data scale (loss summed over the training units, prior included once):
            a number, or a 0-dim tensor of the mean's dtype on its device; finite, positive.

    Raises:
        ShapeMismatchError: the precision is not 0-dim, or differs from the mean in dtype or device.
        NonFiniteError: NaN or infinity.
        NonPositivePrecisionError: a precision of zero or below.
    """

    mean: Tensor
    precision: Tensor
    family: ClassVar[str] = "isotropic"
    richness: ClassVar[int] = 0

    def __init__(self, mean: Tensor, precision: Tensor | float) -> None:
        self._set(mean, mean.new_full((), precision) if isinstance(precision, int | float) else precision)
        self.check()

    def _set(self, mean: Tensor, precision: Tensor) -> None:
        if precision.dim() != 0:
            raise ShapeMismatchError(
                f"isotropic posterior: precision of shape {tuple(precision.shape)}, not one number"
            )
        super()._set(mean, precision)
