"""Merge one adapted layer: stacked exactly, merged in product space and truncated, or factor by factor.

Layers of an adapter are small enough to be held whole; in product space the dense update dW of one layer is the
largest thing in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.errors import NonPositivePrecisionError
from mergekit_bayes.merge.lora import (
    Factors,
    fit_factor_variances,
    product_mean,
    product_variance,
    relative_difference,
    stack,
    truncate_dense,
    truncate_factors,
)
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.registry import MergeMethod
from mergekit_bayes.merge.steps import ModuleStep, Operand
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior
from mergekit_bayes.posterior.mismatch import mismatch

ROWS_ELEMENTS = 1 << 22
"""Elements of dW that are merged at a time in product space."""

Record = dict[str, Any]
Write = Callable[[int, Tensor, Tensor | None], None]
"""Receives 0 for factor A or 1 for factor B, the factor, and its precision or None."""


def run_module(step: ModuleStep, plan: MergePlan, operands: OperandReader, write: Write) -> Record:
    """Merge one adapted layer and hand both factors to `write`.

    Args:
        step: the layer.
        plan: for the method and the options of the recipe.
        operands: reader of the sources.
        write: receives the factors.

    Returns:
        What was measured: lost energy, cross terms, mismatch, misfit of the factor variances.

    Raises:
        NonPositivePrecisionError: negative weights take more precision away than there is.
    """
    run = {"stack": _stack, "product": _product, "factor": _factor}[step.mode]
    return run(step, plan, operands, write)


def coefficients(method: MergeMethod, weights: Sequence[float]) -> list[float]:
    """What a method multiplies each source's update by when all precisions are equal.

    The merge is then a weighted sum of the updates; its coefficients are read off by merging unit vectors.
    """
    count = len(weights)
    one = torch.ones((), dtype=torch.float64)
    unit = torch.eye(count, dtype=torch.float64)
    sources = [Isotropic.unchecked(unit[index], one) for index in range(count)]
    base = Isotropic.unchecked(torch.zeros(count, dtype=torch.float64), one)
    merged = method.kernel(base, sources, torch.tensor(weights, dtype=torch.float64))
    return [float(value) for value in merged.mean]


def _updates(step: ModuleStep, operands: OperandReader) -> list[Factors | None]:
    return [
        None if source is None or source.low_rank is None else operands.factors(source.low_rank)
        for source in step.sources
    ]


def _weighted_sum(step: ModuleStep, plan: MergePlan, updates: list[Factors | None]) -> Factors:
    wanted = coefficients(plan.method, step.weights)
    present = [(update, c) for update, c in zip(updates, wanted, strict=True) if update is not None]
    return stack([update for update, _ in present], [c for _, c in present])


def _stack(step: ModuleStep, plan: MergePlan, operands: OperandReader, write: Write) -> Record:
    exact = _weighted_sum(step, plan, _updates(step, operands))
    if step.truncate is None:
        _write_padded(step, exact, write)
        return {}
    kept = truncate_factors(exact, step.truncate)
    _write_padded(step, Factors(kept.a, kept.b), write)
    return {"lost_energy": kept.lost_energy}


def _write_padded(step: ModuleStep, factors: Factors, write: Write) -> None:
    missing = step.rank - factors.a.shape[0]
    precisions: list[Tensor | None] = [None, None]
    if factors.variance_a is not None and factors.variance_b is not None:
        pairs = ((factors.variance_a, (0, 0, 0, missing)), (factors.variance_b, (0, missing)))
        precisions = [_pad_precision(variance.reciprocal(), sides) for variance, sides in pairs]
    write(0, torch.nn.functional.pad(factors.a, (0, 0, 0, missing)), precisions[0])
    write(1, torch.nn.functional.pad(factors.b, (0, missing)), precisions[1])


def _pad_precision(precision: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Padding is certain: with the largest precision it adds least to the variance of dW."""
    return torch.nn.functional.pad(precision, sides, value=float(precision.max()))


def _product(step: ModuleStep, plan: MergePlan, operands: OperandReader, write: Write) -> Record:
    updates = _updates(step, operands)
    shape = (step.out_features, step.in_features)
    mean = torch.empty(shape, dtype=operands.dtype, device=operands.device)
    precision = torch.empty_like(mean)
    gaps = torch.zeros(len(step.sources), dtype=torch.float64)
    for rows in _row_blocks(shape):
        base = Isotropic.unchecked(torch.zeros_like(mean[rows]), _scalar(step.base, operands))
        posteriors = [
            _product_posterior(source, update, rows, base, operands)
            for source, update in zip(step.sources, updates, strict=True)
        ]
        merged = _merge(step, plan, base, posteriors)
        mean[rows], precision[rows] = merged.mean, merged.precision_tensor()
        gaps += torch.tensor([0.0 if q is None else float(mismatch(merged.mean, q, base)) for q in posteriors])
    _require_positive(step, precision)
    kept = truncate_dense(mean, step.truncate or step.rank, _generator(plan.recipe.seed, step.name))
    record: Record = {"lost_energy": kept.lost_energy, "mismatch": _labelled(step, gaps)}
    factors = Factors(kept.a, kept.b)
    if step.precision_dtype is not None:
        factors, misfit = fit_factor_variances(kept.a, kept.b, precision.reciprocal())
        record["variance_misfit"] = misfit
    _write_padded(step, factors, write)
    return record


def _row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    size = max(1, ROWS_ELEMENTS // max(1, shape[1]))
    yield from (slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size))


def _scalar(base: Operand, operands: OperandReader) -> Tensor:
    assert isinstance(base.precision, float)  # adapter spaces have a scalar prior
    return torch.tensor(base.precision, dtype=operands.dtype, device=operands.device)


def _product_posterior(
    source: Operand | None, update: Factors | None, rows: slice, base: Posterior, operands: OperandReader
) -> Posterior | None:
    """One source's posterior of some rows of dW; None where the adapter leaves the layer alone."""
    if source is None or update is None:
        return None
    mean = product_mean(update, rows)
    if isinstance(source.precision, float):
        return Isotropic.unchecked(mean, torch.tensor(source.precision, dtype=operands.dtype, device=operands.device))
    if isinstance(source.precision, TensorInfo):
        precision = operands.whole_precision(source.precision)[rows]
    else:
        precision = product_variance(update, rows).reciprocal()
    precision = precision / source.divisor
    if source.prior_share is not None:
        precision = precision - source.prior_share + base.precision_tensor()
    return Diagonal.unchecked(mean, precision)


def _merge(step: ModuleStep, plan: MergePlan, base: Posterior, posteriors: Sequence[Posterior | None]) -> Posterior:
    """Apply the kernel; an absent source has the prior for a posterior, or no say where the method has no prior."""
    if plan.method.prior == "required":
        chosen = [(base if q is None else q, w) for q, w in zip(posteriors, step.weights, strict=True)]
    else:
        chosen = [(q, w) for q, w in zip(posteriors, step.weights, strict=True) if q is not None]
    weights = torch.tensor([weight for _, weight in chosen], dtype=base.mean.dtype, device=base.mean.device)
    floor = plan.recipe.precision.floor
    options = {} if floor is None else {"floor": floor}
    return plan.method.kernel(base, [q for q, _ in chosen], weights, **options)


def _require_positive(step: ModuleStep, precision: Tensor) -> None:
    lost = int((~(precision > 0)).sum())
    if lost:
        shown = ", ".join(
            f"{source.label}: {weight:g}" for source, weight in zip(step.sources, step.weights, strict=True) if source
        )
        raise NonPositivePrecisionError(
            f"{step.name}: {lost / precision.numel():.1%} of {precision.numel()} merged precisions are zero or "
            f"negative (lowest {float(precision.min()):.3g}) with weights {shown}; expected positive ones; "
            "make negative weights smaller, prior precision smaller, or set precision.floor"
        )


def _labelled(step: ModuleStep, gaps: Tensor) -> dict[str, float]:
    pairs = zip(step.sources, gaps.tolist(), strict=True)
    return {source.label: gap for source, gap in pairs if source is not None}


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of the layer's own, on the CPU: the same numbers whatever the order, the threads and the device."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _factor(step: ModuleStep, plan: MergePlan, operands: OperandReader, write: Write) -> Record:
    """A with A, B with B.

    B enters with the scaling relative to the first adapter's, so that equal adapters with different alphas agree; the
    first adapter's scaling is folded into the result.
    """
    present = [source for source in step.sources if source is not None and source.low_rank is not None]
    first = present[0].low_rank
    assert first is not None  # factor space needs the module in every adapter
    gaps = torch.zeros(len(step.sources), dtype=torch.float64)
    merged = []
    for which in (0, 1):
        posteriors = [_factor_posterior(source, which, first.scaling, operands, step) for source in present]
        base = Isotropic.unchecked(torch.zeros_like(posteriors[0].mean), _scalar(step.base, operands))
        result = _merge(step, plan, base, posteriors)
        if plan.method.precision != "unused":
            gaps += torch.tensor([float(mismatch(result.mean, q, base)) for q in posteriors])
            _require_positive(step, result.precision_tensor())
        merged.append(result)
    a, b = merged
    exact = _weighted_sum(step, plan, _updates(step, operands))
    factors = Factors(a.mean, b.mean * first.scaling)
    record: Record = {"cross_terms": relative_difference(factors, exact)}
    precisions: list[Tensor | None] = [None, None]
    if step.precision_dtype is not None:
        record["mismatch"] = _labelled(step, gaps)
        precisions = [
            a.precision_tensor().expand_as(a.mean),
            b.precision_tensor().expand_as(b.mean) / first.scaling**2,
        ]
    write(0, factors.a, precisions[0])
    write(1, factors.b, precisions[1])
    return record


def _factor_posterior(
    source: Operand, which: int, reference: float, operands: OperandReader, step: ModuleStep
) -> Posterior:
    low_rank = source.low_rank
    assert low_rank is not None  # factor space needs the module in every adapter
    ratio = 1.0 if which == 0 else low_rank.scaling / reference
    mean = operands.whole(low_rank.a if which == 0 else low_rank.b) * ratio
    stored = low_rank.precision_a if which == 0 else low_rank.precision_b
    if stored is None:
        scalar = source.precision if isinstance(source.precision, float) else 1.0
        return Isotropic.unchecked(mean, torch.tensor(scalar, dtype=operands.dtype, device=operands.device))
    precision = operands.whole_precision(stored) / (source.divisor * ratio**2)
    if source.prior_share is not None:
        precision = precision - source.prior_share + _scalar(step.base, operands)
    return Diagonal.unchecked(mean, precision)
