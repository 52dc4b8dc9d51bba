"""Kronecker terms in a plan: where those of a source lie, and which ones the merged sidecar will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.kronecker_tensors import EIGENVALUES, INPUT_FACTOR, OUTPUT_FACTOR, KroneckerTensors
from mergekit_bayes.checkpoint.writer import TensorEntry

FACTOR_DTYPE = "F32"
"""Factors are written in float32 whatever the recipe says of precisions: a rounded basis is none."""


@dataclass(frozen=True)
class Curvature:
    """The Kronecker terms of one source for the weight of one linear layer, as they lie on disk.

    Attributes:
        factors: input and output factors, and eigenvalues, of (out, in) whatever way the weight is stored.
        divisor: what the curvature is divided by (the number of training units for `scale: mean`, else 1).
    """

    factors: KroneckerTensors
    divisor: float = 1.0

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor that has to be read."""
        return tuple(each for each in self.factors if each is not None)


@dataclass(frozen=True)
class MergedTerms:
    """The Kronecker terms that a merged sidecar will have for one weight.

    Attributes:
        count: number of terms; what a method leaves out is filled with zeros.
        outputs: whether there are output factors, or only identities.
        eigenvalues: whether the terms are eigenvalue-corrected.
        diagonal: whether the diagonal part is more than the scalar prior, and is written beside the terms.
    """

    count: int
    outputs: bool
    eigenvalues: bool
    diagonal: bool


def precision_entries(
    diagonal: TensorEntry, terms: MergedTerms | None, shape: tuple[int, ...]
) -> tuple[TensorEntry, ...]:
    """The tensors of a merged sidecar for one weight: diagonal, input and output factors, eigenvalues, as there are.

    Args:
        diagonal: the entry of a diagonal precision, or of the diagonal part of one with terms.
        terms: the Kronecker terms, or None.
        shape: (out_features, in_features).
    """
    if terms is None:
        return (diagonal,)
    rows, columns = shape
    sides = {INPUT_FACTOR: (columns, columns)}
    if terms.outputs:
        sides[OUTPUT_FACTOR] = (rows, rows)
    if terms.eigenvalues:
        sides[EIGENVALUES] = (rows, columns)
    named = {f"{diagonal.name}.{part}": (terms.count, *side) for part, side in sides.items()}
    factors = tuple(TensorEntry(name, FACTOR_DTYPE, side) for name, side in named.items())
    return (diagonal, *factors) if terms.diagonal else factors


def merged_terms(
    curvatures: Sequence[Curvature | None], weights: Sequence[float], *, diagonal: bool, inputs_only: bool
) -> MergedTerms | None:
    """The terms of S = S_0 + sum_t alpha_t H_t, or None where a merged sidecar has none.

    Terms without an output factor add up to one. A source that is removed has negative ones, which no sidecar holds:
    with them only the diagonal of S is written.

    Args:
        curvatures: of every source; None for those without terms.
        weights: one per source.
        diagonal: whether the diagonal part of S is more than a scalar prior.
        inputs_only: the method knows the curvature of inputs alone.
    """
    used = [(c, w) for c, w in zip(curvatures, weights, strict=True) if c is not None and w != 0.0]
    if not used or any(weight < 0.0 for _, weight in used):
        return None
    factors = [curvature.factors for curvature, _ in used]
    alike = [each for each in factors if each.output is None]
    if inputs_only or len(alike) == len(factors):
        return MergedTerms(1, outputs=False, eigenvalues=False, diagonal=diagonal)
    count = sum(each.terms for each in factors if each.output is not None) + bool(alike)
    corrected = any(each.eigenvalues is not None for each in factors)
    return MergedTerms(count, outputs=True, eigenvalues=corrected, diagonal=diagonal or corrected)
