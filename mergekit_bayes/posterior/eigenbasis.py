r"""Bases of the input and output space of a layer, in which its precision is nearly diagonal.

With orthonormal U_A and U_G, a matrix W becomes U_G^T W U_A. For one Kronecker term and a scalar diagonal the
eigenbases of the two factors make S exactly diagonal, with eigenvalues d + g_i a_j; for several terms those of its
averages over outputs and over inputs (its partial traces) come close, because tasks that start from one model see
similar inputs and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.posterior.term import ROUNDING, Term

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Basis", "eigenbasis", "spectrum"]


class Basis(NamedTuple):
    """Orthonormal bases, one vector per column.

    Attributes:
        input: U_A, shape (in, in).
        output: U_G, shape (out, out); None is the identity.
    """

    input: Tensor
    output: Tensor | None

    def enter(self, x: Tensor) -> Tensor:
        """U_G^T x U_A, the coordinates of a matrix in these bases."""
        return x @ self.input if self.output is None else self.output.mT @ (x @ self.input)

    def leave(self, y: Tensor) -> Tensor:
        """U_G y U_A^T, the matrix that has these coordinates."""
        return y @ self.input.mT if self.output is None else self.output @ (y @ self.input.mT)

    def term(self, term: Term) -> Term:
        """The same Kronecker term in these coordinates."""
        if term.eigenvalues is not None:
            return Term(self.input.mT @ term.input, self._output(term.output), term.eigenvalues)
        output = term.output
        if output is not None and self.output is not None:
            output = self.output.mT @ output @ self.output
        return Term(self.input.mT @ term.input @ self.input, output)

    def _output(self, basis: Tensor | None) -> Tensor | None:
        if self.output is None:
            return basis
        return self.output.mT if basis is None else self.output.mT @ basis

    def diagonal(self, diagonal: Tensor) -> Term:
        """A matrix of numbers that multiplies entry by entry outside, as the term it is in these coordinates."""
        return Term(self.input.mT, None if self.output is None else self.output.mT, diagonal)


def eigenbasis(diagonal: Tensor, terms: Sequence[Term], outputs: int) -> Basis:
    """The eigenbases of S averaged over outputs and over inputs.

    Args:
        diagonal: 0-dim, which changes no basis, or (out, in).
        terms: at least one.
        outputs: the number of rows of W.
    """
    if diagonal.dim() == 0 and all(term.output is None and term.eigenvalues is None for term in terms):
        return Basis(_eigh(sum_of([term.input for term in terms]))[1], None)
    inner = sum_of([term.over_outputs(outputs) for term in terms])
    outer = sum_of([term.over_inputs(outputs) for term in terms])
    if diagonal.dim():
        inner.diagonal().add_(diagonal.mean(dim=0))
        outer.diagonal().add_(diagonal.mean(dim=1))
    return Basis(_eigh(inner)[1], _eigh(outer)[1])


def spectrum(diagonal: Tensor, terms: Sequence[Term], outputs: int) -> Term | None:
    """S with its eigenvectors and eigenvalues, as an eigenvalue-corrected term without a diagonal beside it.

    None where there is no closed form: several terms, or a diagonal that is not one number. Eigenvalues of factors
    that rounding made slightly negative count as zero.

    Args:
        diagonal: 0-dim or (out, in).
        terms: as they come from `combined`.
        outputs: the number of rows of W.
    """
    if diagonal.dim() or len(terms) != 1:
        return None
    (term,) = terms
    if term.eigenvalues is not None:
        return term._replace(eigenvalues=term.eigenvalues + diagonal)
    values, inner = _eigh(term.input)
    if term.output is None:
        return Term(inner, None, (values + diagonal).expand(outputs, -1))
    heights, outer = _eigh(term.output)
    return Term(inner, outer, heights[:, None] * values + diagonal)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum in the order given, as a new tensor."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total.add_(tensor)
    return total


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix; negative values at the size of rounding are zero."""
    import torch

    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if values.numel() == 0:
        return values, vectors
    noise = ROUNDING * values.abs().amax() * len(values)
    return values.where((values > 0) | (values < -noise), 0.0), vectors
