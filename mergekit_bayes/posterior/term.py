r"""One Kronecker term of a curvature: the loss of one linear layer, seen from its inputs and its outputs.

For a layer y = W x with W of shape (out, in), the curvature of a loss is about G (x) A, with A the second moment of
the inputs x and G that of the gradients with respect to y (Martens and Grosse, arXiv 1503.05671). It acts on a matrix
of W's shape without ever being formed:

    plain                    H[W] = G W A
    eigenvalue-corrected     H[W] = U_G (L * (U_G^T W U_A)) U_A^T

the second with the eigenbases of G and A, and L what the curvature really is along each pair of them (George et al.,
arXiv 1806.03884).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ROUNDING", "Term", "combined"]

ROUNDING = 2.0**-23
"""Relative size of what may be rounding in a factor, whatever its dtype: that of float32, in which they are stored."""


class Term(NamedTuple):
    """A symmetric Kronecker product that acts on matrices of shape (out, in).

    Attributes:
        input: A, shape (in, in); with `eigenvalues`, the orthonormal basis U_A, one eigenvector per column.
        output: G, shape (out, out), or the basis U_G; None is the identity.
        eigenvalues: L, shape (out, in), or None for the plain product.
    """

    input: Tensor
    output: Tensor | None
    eigenvalues: Tensor | None = None

    def times(self, x: Tensor) -> Tensor:
        """H[x], of the shape (out, in) of x."""
        if self.eigenvalues is None:
            return _left(self.output, x @ self.input)
        inner = _left(None if self.output is None else self.output.mT, x @ self.input)
        return _left(self.output, (inner * self.eigenvalues) @ self.input.mT)

    def quadratic(self, x: Tensor) -> Tensor:
        """x^T H x, summed over all entries; 0-dim."""
        return (x * self.times(x)).sum()

    def diagonal(self) -> Tensor:
        """The diagonal of H, of shape (out, in), or (in,) where all outputs are alike."""
        if self.eigenvalues is not None:
            rows = self.eigenvalues @ self.input.square().mT
            return rows if self.output is None else self.output.square() @ rows
        columns = self.input.diagonal()
        return columns if self.output is None else self.output.diagonal()[:, None] * columns

    def scaled(self, factor: Tensor | float) -> Term:
        """The term alpha H; the factor goes where no other tensor has to be touched."""
        if self.eigenvalues is not None:
            return self._replace(eigenvalues=self.eigenvalues * factor)
        if self.output is not None:
            return self._replace(output=self.output * factor)
        return self._replace(input=self.input * factor)

    def shrunk(self, gamma: float) -> tuple[Term, Tensor | None]:
        """The term with its off-diagonal entries drawn towards zero, and what is purely diagonal in it beside that.

        A plain term stays one: the off-diagonal entries of A and G are multiplied by 1 - gamma, which keeps both
        positive semi-definite. An eigenvalue-corrected term becomes (1 - gamma) H + gamma diag(H).

        Args:
            gamma: between 0 (nothing changes) and 1 (only the diagonal of H is left).
        """
        if self.eigenvalues is not None:
            return self._replace(eigenvalues=self.eigenvalues * (1 - gamma)), self.diagonal() * gamma
        output = None if self.output is None else _shrunk(self.output, gamma)
        return self._replace(input=_shrunk(self.input, gamma), output=output), None

    def over_outputs(self, outputs: int) -> Tensor:
        """The curvature of the inputs alone: H averaged over the outputs, shape (in, in).

        It is A times the mean of the diagonal of G, the multiple of A closest to the term in I (x) A.

        Args:
            outputs: the number of rows of W, which a term with `output` None does not know.
        """
        if self.eigenvalues is not None:
            return (self.input * self.eigenvalues.mean(dim=0)) @ self.input.mT
        if self.output is None:
            return self.input
        return self.input * (self.output.diagonal().sum() / outputs)

    def over_inputs(self, outputs: int) -> Tensor:
        """The curvature of the outputs alone: H averaged over the inputs, shape (out, out).

        Args:
            outputs: the number of rows of W, which a term with `output` None does not know.
        """
        import torch

        if self.eigenvalues is not None:
            means = self.eigenvalues.mean(dim=1)
            return means.diag() if self.output is None else (self.output * means) @ self.output.mT
        mean = self.input.diagonal().mean()
        if self.output is None:
            return torch.eye(outputs, dtype=self.input.dtype, device=self.input.device) * mean
        return self.output * mean

    def to(self, dtype: torch.dtype) -> Term:
        """The same term in another dtype."""
        output = None if self.output is None else self.output.to(dtype)
        return Term(self.input.to(dtype), output, None if self.eigenvalues is None else self.eigenvalues.to(dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that make up the term, without those that are None."""
        return tuple(each for each in self if each is not None)


def combined(terms: Iterable[Term]) -> tuple[Term, ...]:
    """The same sum with as few terms as can be had by adding factors; what cancels exactly is gone.

    G (x) A + G' (x) A = (G + G') (x) A, and likewise for a common G, of which the identity is one. So all terms without
    output factor become one, and a task's term is removed by its negative.
    """
    kept: list[Term] = []
    for term in terms:
        for position, other in enumerate(kept):
            joined = _joined(other, term)
            if joined is not None:
                kept[position] = joined
                break
        else:
            kept.append(term)
    return tuple(term for term in kept if not any(bool((each == 0).all()) for each in term.tensors()))


def _joined(left: Term, right: Term) -> Term | None:
    same_input, same_output = _same(left.input, right.input), _same(left.output, right.output)
    if left.eigenvalues is not None and right.eigenvalues is not None:
        both = same_input and same_output
        return left._replace(eigenvalues=left.eigenvalues + right.eigenvalues) if both else None
    if left.eigenvalues is not None or right.eigenvalues is not None:
        return None
    if same_output:
        return left._replace(input=left.input + right.input)
    if same_input and left.output is not None and right.output is not None:
        return left._replace(output=left.output + right.output)
    return None


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left is right or bool((left == right).all())


def _left(matrix: Tensor | None, x: Tensor) -> Tensor:
    return x if matrix is None else matrix @ x


def _shrunk(matrix: Tensor, gamma: float) -> Tensor:
    shrunk = matrix * (1 - gamma)
    shrunk.diagonal().copy_(matrix.diagonal())
    return shrunk
