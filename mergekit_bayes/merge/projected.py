r"""A precision as one factor of a low-rank update sees it, while the other factor is held.

With X = B A, the quadratic x^T S x restricted to B has the precision  B -> S[B A] A^T,  and restricted to A the
precision  A -> B^T S[B A].  For S = diag(D) + sum_k G_k (x) A_k both are small again: a plain term seen from B is
G_k B (A A_k A^T), with a matrix of rank x rank instead of in x in.

Pure functions of posteriors and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.kronecker import Kronecker
from mergekit_bayes.posterior.term import Term

Operator = Callable[[Tensor], Tensor]


class Projected(NamedTuple):
    """A precision restricted to one factor.

    Attributes:
        times: applies it to a matrix of the factor's shape.
        diagonal: its diagonal, of that shape, > 0.
    """

    times: Operator
    diagonal: Tensor


def parts(posterior: Posterior) -> tuple[Tensor, tuple[Term, ...]]:
    """D, 0-dim or of the mean's shape, and the Kronecker terms of a precision; a mixture's is its diagonal."""
    if isinstance(posterior, Kronecker):
        return posterior.diagonal, posterior.terms
    return posterior.precision_tensor(), ()


def seen_by_outputs(posterior: Posterior, a: Tensor) -> Projected:
    """The precision of B where X = B A.

    Args:
        posterior: only its precision is used.
        a: factor A with orthonormal rows, shape (rank, in).

    Returns:
        On matrices of shape (out, rank).
    """
    diagonal, terms = parts(posterior)
    entries = Projected(_entries_by_outputs(diagonal, a), _diagonal_by_outputs(diagonal, posterior, a))
    return _sum_of([entries, *(_term_by_outputs(term, a) for term in terms)])


def seen_by_inputs(posterior: Posterior, b: Tensor) -> Projected:
    """The precision of A where X = B A.

    Args:
        posterior: only its precision is used.
        b: factor B with orthonormal columns, shape (out, rank).

    Returns:
        On matrices of shape (rank, in).
    """
    diagonal, terms = parts(posterior)
    entries = Projected(_entries_by_inputs(diagonal, b), _diagonal_by_inputs(diagonal, posterior, b))
    return _sum_of([entries, *(_term_by_inputs(term, b) for term in terms)])


def _sum_of(summands: Sequence[Projected]) -> Projected:
    first, *others = summands

    def times(x: Tensor) -> Tensor:
        total = first.times(x)
        for other in others:
            total = total + other.times(x)
        return total

    return Projected(times, sum((other.diagonal for other in others), start=first.diagonal))


def _entries_by_outputs(diagonal: Tensor, a: Tensor) -> Operator:
    if diagonal.dim() == 0:
        return lambda b: b * diagonal
    return lambda b: (b @ a).mul_(diagonal) @ a.T


def _entries_by_inputs(diagonal: Tensor, b: Tensor) -> Operator:
    if diagonal.dim() == 0:
        return lambda a: a * diagonal
    return lambda a: b.T @ (b @ a).mul_(diagonal)


def _diagonal_by_outputs(diagonal: Tensor, posterior: Posterior, a: Tensor) -> Tensor:
    if diagonal.dim() == 0:
        return diagonal.expand(posterior.mean.shape[0], a.shape[0])
    return diagonal @ a.square().T


def _diagonal_by_inputs(diagonal: Tensor, posterior: Posterior, b: Tensor) -> Tensor:
    if diagonal.dim() == 0:
        return diagonal.expand(b.shape[1], posterior.mean.shape[1])
    return b.square().T @ diagonal


def _term_by_outputs(term: Term, a: Tensor) -> Projected:
    seen = a @ term.input
    if term.eigenvalues is None:
        small = Term(seen @ a.T, term.output)
        return Projected(small.times, small.diagonal())
    values, output = term.eigenvalues, term.output

    def times(b: Tensor) -> Tensor:
        inner = (b if output is None else output.T @ b) @ seen
        outer = inner.mul_(values) @ seen.T
        return outer if output is None else output @ outer

    rows = values @ seen.square().T
    return Projected(times, rows if output is None else output.square() @ rows)


def _term_by_inputs(term: Term, b: Tensor) -> Projected:
    if term.eigenvalues is None:
        # Columns of B are orthonormal, so that an identity stays one.
        small = Term(term.input, None if term.output is None else b.T @ term.output @ b)
        return Projected(small.times, small.diagonal())
    values, basis = term.eigenvalues, term.input
    seen = b if term.output is None else term.output.T @ b

    def times(a: Tensor) -> Tensor:
        return (seen.T @ (seen @ (a @ basis)).mul_(values)) @ basis.T

    return Projected(times, seen.square().T @ values @ basis.square().T)
