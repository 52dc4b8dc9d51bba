"""The precision of a merge as its sidecar stores it: a diagonal, Kronecker terms, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.writer import TensorEntry
from mergekit_bayes.errors import MethodError
from mergekit_bayes.merge.curvature import MergedTerms
from mergekit_bayes.merge.sink import Sink
from mergekit_bayes.posterior import Kronecker, Posterior, Term


def write_precision(
    sink: Sink,
    entries: Sequence[TensorEntry],
    terms: MergedTerms | None,
    merged: Posterior,
    *,
    scale: float,
    transposed: bool = False,
) -> None:
    """Write the precision of one merged tensor.

    Args:
        sink: where it goes.
        entries: those of the step; none where no precision is wanted.
        terms: the terms that were laid out for it; None for a diagonal alone.
        merged: the merged posterior, (out, in) for a linear layer.
        scale: brings its precision back to the scale of the data.
        transposed: the diagonal is stored as (in, out).

    Raises:
        NumericalError: the precision is not positive and finite.
        MethodError: the method returned terms that its posteriors do not add up to, which is a fault of the method.
    """
    if not entries:
        return
    own = merged.terms if isinstance(merged, Kronecker) else ()
    diagonal = merged.diagonal if terms is not None and isinstance(merged, Kronecker) else merged.precision_tensor()
    if terms is None or terms.diagonal:
        whole = (diagonal * scale).expand_as(merged.mean)
        sink.precisions({entries[0]: whole.T if transposed else whole})
    if terms is not None:
        values = packed(terms, [term.scaled(scale) for term in own], tuple(merged.mean.shape))
        sink.factors(dict(zip(entries[terms.diagonal :], values, strict=True)))


def packed(terms: MergedTerms, found: Sequence[Term], shape: tuple[int, ...]) -> list[Tensor]:
    """Input factors, output factors and eigenvalues of terms, each stacked into one tensor, as far as laid out.

    Args:
        terms: what was laid out.
        found: the terms; fewer are filled up with zeros.
        shape: (out, in).

    Raises:
        MethodError: they do not fit into what was laid out.
    """
    if len(found) > terms.count or not all(_fits(terms, term) for term in found):
        raise MethodError(f"the method returned {len(found)} Kronecker terms where its sources add up to {terms.count}")
    known = [_corrected(term, shape) if terms.eigenvalues else term for term in found]
    rows, columns = shape
    stacks = [_stacked([term.input for term in known], terms.count, (columns, columns))]
    if terms.outputs:
        identity = torch.eye(rows, dtype=stacks[0].dtype, device=stacks[0].device) if known else torch.empty(0)
        outputs = [identity if term.output is None else term.output for term in known]
        stacks.append(_stacked(outputs, terms.count, (rows, rows)))
    if terms.eigenvalues:
        stacks.append(_stacked([e for term in known if (e := term.eigenvalues) is not None], terms.count, shape))
    return stacks


def _fits(terms: MergedTerms, term: Term) -> bool:
    return (terms.outputs or term.output is None) and (terms.eigenvalues or term.eigenvalues is None)


def _stacked(parts: Sequence[Tensor], count: int, shape: tuple[int, ...]) -> Tensor:
    if not parts:
        return torch.zeros((count, *shape))
    return torch.stack([*parts, *(torch.zeros_like(parts[0]) for _ in range(count - len(parts)))])


def _corrected(term: Term, shape: tuple[int, ...]) -> Term:
    """A term in its eigenbases, U_G (L * (U_G^T W U_A)) U_A^T with L the products of eigenvalues."""
    if term.eigenvalues is not None:
        return term
    inner, basis = torch.linalg.eigh(term.input)
    if term.output is None:
        identity = torch.eye(shape[0], dtype=basis.dtype, device=basis.device)
        return Term(basis, identity, inner.expand(shape).contiguous())
    outer, outer_basis = torch.linalg.eigh(term.output)
    return Term(basis, outer_basis, outer[:, None] * inner)
