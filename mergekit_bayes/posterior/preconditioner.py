r"""What conjugate gradients divide by, in bases where a precision is nearly diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.errors import NonPositivePrecisionError
from mergekit_bayes.posterior.term import ROUNDING, Term

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK", "Preconditioner"]

BLOCK = 1024
"""Number of entries whose full matrix is factorised: a tenth of a second, where one iteration of a layer takes more."""


class Preconditioner:
    """M ~ S: the full matrix of the plain terms among the entries of largest curvature, the diagonal of S elsewhere.

    Tasks differ most along the few directions in which they have learned most, and there the off-diagonal part counts
    (on factors of a pretrained encoder it saves a third of the iterations). Along directions whose curvature drowns
    in the rounding of the largest, M keeps to what rounding leaves, so that a solution stays near zero there instead of
    amplifying it.

    Args:
        diagonal: 0-dim, the scalar part of S.
        terms: the Kronecker terms, in bases where they are nearly diagonal.

    Attributes:
        rounding: the curvature along a unit vector that the rounding of factors can fake.

    Raises:
        NonPositivePrecisionError: the diagonal of S is negative beyond rounding.
    """

    def __init__(self, diagonal: Tensor, terms: Sequence[Term]) -> None:
        import torch

        total = diagonal
        for term in terms:
            total = total + term.diagonal()
        lowest, highest = (float(bound) for bound in total.aminmax())
        self.rounding = 16 * ROUNDING * highest
        if lowest < -self.rounding or highest <= 0:
            raise NonPositivePrecisionError(
                f"the precision is not positive definite: its curvature along a direction is {lowest:.3g}; "
                "a precision must be positive in every direction"
            )
        # A negative number shows that the factors carry the rounding of float32, whatever dtype they have by now.
        unit = torch.finfo(total.dtype).eps if lowest > 0 else ROUNDING
        self._diagonal = total.clamp(min=16 * unit * highest)
        self._places: Tensor | None = None
        plain = [term for term in terms if term.eigenvalues is None and term.output is not None]
        if plain and len(terms) > 1:
            self._factorise(plain)

    def _factorise(self, plain: Sequence[Term]) -> None:
        import torch

        places = self._diagonal.flatten().topk(min(BLOCK, self._diagonal.numel())).indices
        columns = self._diagonal.shape[1]
        row, column = places // columns, places % columns
        block = self._diagonal.new_zeros((len(places), len(places)))
        for term in plain:
            assert term.output is not None
            block.addcmul_(term.output[row][:, row], term.input[column][:, column])
        block.diagonal().copy_(self._diagonal.flatten()[places])
        factor, fault = torch.linalg.cholesky_ex(block)
        if int(fault) == 0:  # else the diagonal serves: negative curvature is for the iterations to see
            self._places, self._factor = places, factor

    def solve(self, residual: Tensor) -> Tensor:
        """M^-1[r], a new tensor of the shape of r."""
        import torch

        quotient = (residual / self._diagonal).contiguous()
        if self._places is not None:
            chosen = residual.flatten()[self._places][:, None]
            quotient.view(-1)[self._places] = torch.cholesky_solve(chosen, self._factor)[:, 0]
        return quotient
