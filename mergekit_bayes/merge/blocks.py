"""One block of one tensor: cast, merge, check, cast back. Knows no file and no recipe.

Blocks arrive in the dtype they are stored in and leave in the dtype they are written in; the arithmetic between is
float32 (float64 on request). `combine` is one pure function so that a compiler can fuse it into one pass over memory;
without a compiler `in_chunks` runs it on pieces that stay in the processor's cache, which is about three
times faster than whole tensors and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.merge.registry import Merge, MergeMethod
from mergekit_bayes.merge.steps import Options
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior
from mergekit_bayes.posterior.mismatch import mismatch

CHUNK = 262_144
"""Elements per piece without a compiler. A dozen float32 temporaries of this size stay in the processor's caches, and
the operations are long enough that worker threads seldom wait for each other's turn at the interpreter."""


class Stored(NamedTuple):
    """One operand of a block, as it was read.

    Attributes:
        mean: shape (elements,), any floating dtype.
        precision: shape (elements,) in any floating dtype, or 0-dim in the compute dtype.
        divisor: 0-dim; `precision` is divided by it.
        prior_share: 0-dim, subtracted afterwards in exchange for the base's precision; None: nothing to exchange.
        floor: what the precision is then raised to at least; None to leave it.
    """

    mean: Tensor
    precision: Tensor
    divisor: Tensor | None = None
    prior_share: Tensor | None = None
    floor: float | None = None


class Merged(NamedTuple):
    """The result of a block.

    Attributes:
        mean: shape (elements,), in the output dtype.
        precision: shape (elements,) in the sidecar's dtype, or None where none is written.
        mismatch: shape (sources,), the block's share of 0.5 sum (m - m_t)^2 (S_t - S_0); None where not asked for.
        lowest_precision: 0-dim, the smallest merged precision; None where the block is empty.
        floored: 0-dim, how many entries the floor raised; None without a floor.
    """

    mean: Tensor
    precision: Tensor | None
    mismatch: Tensor | None
    lowest_precision: Tensor | None
    floored: Tensor | None


@dataclass(frozen=True)
class Formula:
    """Everything about a block's arithmetic that does not change from block to block.

    Attributes:
        method: the merge method.
        dtype: compute dtype, torch.float32 or torch.float64.
        mean_dtype: dtype of the written mean.
        precision_dtype: dtype of the written precision, or None.
        with_mismatch: whether the mismatch is wanted; needs precisions.
        floor: lower bound of the merged precision, or None.
        precision_scale: the written precision is the merged one times this.
        options: the method's own parameters, as its kernel takes them.
    """

    method: MergeMethod
    dtype: torch.dtype
    mean_dtype: torch.dtype
    precision_dtype: torch.dtype | None
    with_mismatch: bool
    floor: float | None = None
    precision_scale: float = 1.0
    options: Options = ()


def _posterior(mean: Tensor, precision: Tensor) -> Posterior:
    return Isotropic.unchecked(mean, precision) if precision.dim() == 0 else Diagonal.unchecked(mean, precision)


def as_posterior(stored: Stored, prior: Tensor | None, dtype: torch.dtype) -> Posterior:
    """The posterior that an operand stands for.

    Args:
        stored: as it was read.
        prior: S_0 of the merge, which takes the place of the operand's own prior; None for the base itself.
        dtype: compute dtype.
    """
    precision = stored.precision.to(dtype)
    # What was read stays as it is, for the messages about it; a cast is ours to overwrite.
    ours = stored.precision.dtype != dtype
    if stored.divisor is not None:
        precision, ours = precision.div_(stored.divisor) if ours else precision / stored.divisor, True
    if stored.prior_share is not None and prior is not None:
        likelihood = precision.sub_(stored.prior_share) if ours else precision - stored.prior_share
        precision = likelihood.add_(prior) if likelihood.dim() >= prior.dim() else likelihood + prior
    if stored.floor is not None:
        precision = precision.clamp(min=stored.floor)
    return _posterior(stored.mean.to(dtype), precision)


def combine(formula: Formula, base: Stored, sources: Sequence[Stored], weights: Tensor) -> Merged:
    """Merge one block.

    Args:
        formula: the arithmetic.
        base: the base's mean and prior precision S_0.
        sources: the task posteriors.
        weights: shape (sources,), float64: what they leave for the base is taken before rounding.

    Returns:
        The merged block.
    """
    prior = as_posterior(base, None, formula.dtype)
    posteriors = [as_posterior(source, prior.precision_tensor(), formula.dtype) for source in sources]
    found = formula.method.kernel(prior, posteriors, weights, floor=formula.floor, **dict(formula.options))
    merged = Merge.of(found).posterior if formula.method.scope == "tensor" else found
    gaps = None
    if formula.with_mismatch:
        gaps = torch.stack([mismatch(merged.mean, source, prior) for source in posteriors])
    return _written(formula, merged, gaps)


def _written(formula: Formula, merged: Posterior, gaps: Tensor | None) -> Merged:
    precision = merged.precision_tensor()
    lowest = precision.amin() if merged.mean.numel() else None
    floored = None
    if formula.floor is not None:
        floored = (precision <= formula.floor).expand_as(merged.mean).sum()
    written = None
    if formula.precision_dtype is not None:
        scaled = precision if formula.precision_scale == 1.0 else precision * formula.precision_scale
        written = scaled.expand_as(merged.mean).to(formula.precision_dtype).contiguous()
    return Merged(merged.mean.to(formula.mean_dtype), written, gaps, lowest, floored)


Combine = Callable[[Stored, Sequence[Stored], Tensor], Merged]


def in_chunks(formula: Formula) -> Combine:
    """`combine` for machines without a compiler: piece by piece, results gathered in order."""
    return partial(_combine_in_chunks, formula)


def _slice(stored: Stored, piece: slice) -> Stored:
    precision = stored.precision if stored.precision.dim() == 0 else stored.precision[piece]
    return stored._replace(mean=stored.mean[piece], precision=precision)


def _combine_in_chunks(formula: Formula, base: Stored, sources: Sequence[Stored], weights: Tensor) -> Merged:
    count = base.mean.numel()
    if count <= CHUNK:
        return combine(formula, base, sources, weights)
    mean = torch.empty(count, dtype=formula.mean_dtype, device=base.mean.device)
    precision = None
    if formula.precision_dtype is not None:
        precision = torch.empty(count, dtype=formula.precision_dtype, device=base.mean.device)
    parts: list[Merged] = []
    for start in range(0, count, CHUNK):
        piece = slice(start, min(start + CHUNK, count))
        part = combine(formula, _slice(base, piece), [_slice(source, piece) for source in sources], weights)
        mean[piece] = part.mean
        if precision is not None and part.precision is not None:
            precision[piece] = part.precision
        parts.append(part)
    return Merged(mean, precision, *_totals(parts))


def _totals(parts: Sequence[Merged]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    gaps = [part.mismatch for part in parts if part.mismatch is not None]
    lowest = [part.lowest_precision for part in parts if part.lowest_precision is not None]
    floored = [part.floored for part in parts if part.floored is not None]
    return (
        torch.stack(gaps).double().sum(dim=0) if gaps else None,
        torch.stack(lowest).amin() if lowest else None,
        torch.stack(floored).sum() if floored else None,
    )


def compiled(formula: Formula) -> Combine:
    """`combine` fused into one pass over memory by torch.compile; one graph serves every block length."""
    return torch.compile(partial(combine, formula), dynamic=True, fullgraph=True)
