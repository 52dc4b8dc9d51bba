"""Merge one adapted layer: stacked exactly, merged in product space and truncated, or factor by factor.

Layers of an adapter are small enough to be held whole; in product space the dense update dW of one layer and its
variance are the largest things in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.merge.apply import Record, Source, apply_method, floored
from mergekit_bayes.merge.checks import require_positive
from mergekit_bayes.merge.lora import (
    Factors,
    fit_factor_variances,
    product_mean,
    product_precision,
    relative_difference,
    row_blocks,
    stack,
)
from mergekit_bayes.merge.low_rank import low_rank
from mergekit_bayes.merge.merged_terms import write_precision
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.registry import MergeMethod
from mergekit_bayes.merge.sink import Sink
from mergekit_bayes.merge.steps import ModuleStep, Operand
from mergekit_bayes.merge.truncation import truncate_dense, truncate_factors
from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Posterior
from mergekit_bayes.posterior.mismatch import mismatch

PADDING_PRECISION = 1e3
"""How many times more certain padding is than the most certain entry of its factor."""

Pair = tuple[Tensor, Tensor]
"""Factor A and factor B, or their precisions."""


def run_module(step: ModuleStep, plan: MergePlan, operands: OperandReader, sink: Sink) -> Record:
    """Merge one adapted layer and write both factors.

    Args:
        step: the layer.
        plan: for the method and the options of the recipe.
        operands: reader of the sources.
        sink: where the factors go.

    Returns:
        What was measured: lost energy, cross terms, mismatch, misfit of the factor variances, floored precisions.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
        NonPositivePrecisionError: negative weights take more precision away than there is.
    """
    run = {"stack": _stack, "product": _product, "factor": _factor}[step.mode]
    return run(step, plan, operands, sink)


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


def _stack(step: ModuleStep, plan: MergePlan, operands: OperandReader, sink: Sink) -> Record:
    exact = _weighted_sum(step, plan, _updates(step, operands))
    if step.truncate is None:
        _write_padded(step, (exact.a, exact.b), (None, None), sink)
        return {}
    kept = truncate_factors(exact, step.truncate)
    _write_padded(step, (kept.a, kept.b), (None, None), sink)
    return {"lost_energy": kept.lost_energy}


def _write_padded(step: ModuleStep, means: Pair, precisions: tuple[Tensor | None, Tensor | None], sink: Sink) -> None:
    missing = step.rank - means[0].shape[0]
    for which, sides in enumerate(((0, 0, 0, missing), (0, missing))):
        precision = precisions[which]
        sink.mean(step.entries[which], torch.nn.functional.pad(means[which], sides), "the merged factor")
        if precision is not None:
            sink.precisions({step.precision_entries[which]: _pad_precision(precision, sides)})


def _pad_precision(precision: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Padding is zero for certain: so precise that it adds next to nothing to the variance of dW."""
    limit = torch.finfo(precision.dtype).max / PADDING_PRECISION
    return torch.nn.functional.pad(precision, sides, value=PADDING_PRECISION * min(float(precision.max()), limit))


def _product(step: ModuleStep, plan: MergePlan, operands: OperandReader, sink: Sink) -> Record:
    merged, record = _merge_product(step, plan, operands)
    means, cost = _truncated(step, plan, merged)
    precisions: tuple[Tensor | None, Tensor | None] = (None, None)
    if step.weight is not None:
        write_precision(sink, step.precision_entries, step.terms, merged, scale=plan.precision_scale)
    elif step.precision_dtype is not None:
        # The fit is not linear, so the scale it is written at comes first.
        spread = (merged.precision_tensor().expand_as(merged.mean) * plan.precision_scale).reciprocal_()
        variances, cost["variance_misfit"] = fit_factor_variances(*means, spread)
        precisions = (variances[0].reciprocal_(), variances[1].reciprocal_())
    _write_padded(step, means, precisions, sink)
    return record | cost


def _truncated(step: ModuleStep, plan: MergePlan, merged: Posterior) -> tuple[Pair, Record]:
    """The merged update in factors of the step's rank, and what that costs."""
    rank, generator = step.truncate or step.rank, _generator(plan.recipe.seed, step.name)
    if plan.method.precision == "unused":
        plain = truncate_dense(merged.mean, rank, generator)
        return (plain.a, plain.b), {"lost_energy": plain.lost_energy}
    kept = low_rank(merged, rank, generator)
    losses = {"truncation_loss": kept.loss, "plain_truncation_loss": kept.plain_loss}
    return (kept.a, kept.b), {"lost_energy": kept.lost_energy, **losses}


def _merge_product(step: ModuleStep, plan: MergePlan, operands: OperandReader) -> tuple[Posterior, Record]:
    """The posterior of the merged dW, shape (out_features, in_features), and what was measured."""
    updates = _updates(step, operands)
    mean = torch.empty((step.out_features, step.in_features), dtype=operands.dtype, device=operands.device)
    precision = torch.empty_like(mean)
    gaps = torch.zeros(len(step.sources), dtype=torch.float64)
    prior = _prior(step, operands)
    measures: Record = {}
    for rows in (slice(None),) if step.whole else row_blocks(mean.shape):
        base = _posterior(torch.zeros_like(mean[rows]), prior[rows] if prior.dim() else prior)
        pairs = zip(step.sources, updates, strict=True)
        posteriors = [_product_posterior(source, update, rows, base, operands) for source, update in pairs]
        merged, measured = _merge(step, plan, base, posteriors)
        mean[rows], precision[rows] = merged.mean, merged.precision_tensor()
        if plan.method.precision != "unused":
            gaps += _gaps(merged.mean, posteriors, base)
            measures["mismatch"] = _labelled(step, gaps)
        measures |= measured
    if plan.method.precision != "unused":
        require_positive(step, precision)
        measures |= floored(plan, precision)
    return (merged if step.whole else Diagonal.unchecked(mean, precision)), measures


def _prior(step: ModuleStep, operands: OperandReader) -> Tensor:
    """S_0 of dW: one number, or that of the base's weight, shape (out_features, in_features)."""
    if not isinstance(step.base.precision, TensorInfo):
        return _scalar(step.base.precision, operands)
    stored = operands.whole_precision(step.base.precision).div_(step.base.divisor)
    return stored.T if step.transposed else stored


def _posterior(mean: Tensor, precision: Tensor) -> Posterior:
    return Diagonal.unchecked(mean, precision) if precision.dim() else Isotropic.unchecked(mean, precision)


def _product_posterior(
    source: Operand | None, update: Factors | None, rows: slice, base: Posterior, operands: OperandReader
) -> Posterior | None:
    """One source's posterior of some rows of dW; None where the adapter leaves the layer alone."""
    if source is None or update is None:
        return None
    mean = product_mean(update, rows)
    if source.curvature is not None:
        beside = operands.update_posterior(source, mean, rows, base) if source.of_update else base
        return Kronecker.unchecked(mean, beside.precision_tensor(), operands.terms(source.curvature))
    if source.of_update:
        return operands.update_posterior(source, mean, rows, base)
    if isinstance(source.precision, TensorInfo):
        return base.with_mean(mean)  # that of the base's weight
    if update.variance_a is None:
        return Isotropic.unchecked(mean, _scalar(source.precision, operands))
    precision = product_precision(update, rows).div_(source.divisor)
    if update.prior_variance is not None:
        precision += base.precision_tensor()
    return Diagonal.unchecked(mean, precision.clamp_(min=source.floor) if source.floor is not None else precision)


def _scalar(precision: object, operands: OperandReader) -> Tensor:
    assert isinstance(precision, float)  # the plan gives factors without precisions a number
    return torch.tensor(precision, dtype=operands.dtype, device=operands.device)


def _merge(
    step: ModuleStep, plan: MergePlan, base: Posterior, posteriors: Sequence[Posterior | None]
) -> tuple[Posterior, Record]:
    """Apply the method; an absent source has a zero update and the prior, or no say where precisions alone count."""
    labels = sorted(source.label for source in plan.sources)
    known = zip(labels, posteriors, step.weights, strict=True)
    return apply_method(
        plan,
        step,
        base,
        [
            Source(label, base if q is None else q, weight)
            for label, q, weight in known
            if q is not None or not plan.method.needs_evidence
        ],
    )


def _gaps(merged: Tensor, posteriors: Sequence[Posterior | None], base: Posterior) -> Tensor:
    """Mismatch of every source; an absent one has none."""
    found = [0.0 if q is None else float(mismatch(merged, q, base)) for q in posteriors]
    return torch.tensor(found, dtype=torch.float64)


def _labelled(step: ModuleStep, gaps: Tensor) -> dict[str, float]:
    pairs = zip(step.sources, gaps.tolist(), strict=True)
    return {source.label: gap for source, gap in pairs if source is not None}


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator of the layer's own, on the CPU: the same numbers whatever the order, the threads and the device."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _factor(step: ModuleStep, plan: MergePlan, operands: OperandReader, sink: Sink) -> Record:
    """A with A, B with B: B as it is at the reference scaling, which is baked into the result."""
    sources = [source for source in step.sources if source is not None]
    gaps = torch.zeros(len(sources), dtype=torch.float64)
    prior = _scalar(step.base.precision, operands)
    merged = []
    for which in (0, 1):
        posteriors = [_factor_posterior(source, which, step.scaling, prior, operands) for source in sources]
        base = Isotropic.unchecked(torch.zeros_like(posteriors[0].mean), prior)
        merged.append(_merge(step, plan, base, posteriors)[0])
        gaps += _gaps(merged[which].mean, posteriors, base)
    a, b = merged[0].mean, merged[1].mean * step.scaling
    record = _cross_terms(Factors(a, b), _weighted_sum(step, plan, _updates(step, operands)))
    if plan.method.precision != "unused":
        own = [q.precision_tensor().expand_as(q.mean) for q in merged]
        for precision in own:
            require_positive(step, precision)
        record |= {"mismatch": _labelled(step, gaps), **floored(plan, *own)}
    precisions: tuple[Tensor | None, Tensor | None] = (None, None)
    if step.precision_dtype is not None:
        precisions = (own[0] * plan.precision_scale, own[1] * (plan.precision_scale / step.scaling**2))
    _write_padded(step, (a, b), precisions, sink)
    return record


def _cross_terms(merged: Factors, exact: Factors) -> Record:
    """Size of what averaging A and B separately adds, against the exact weighted sum; nothing where that vanishes."""
    size = relative_difference(merged, exact)
    return {"cross_terms": size} if math.isfinite(size) else {}


def _factor_posterior(
    source: Operand, which: int, reference: float, prior: Tensor, operands: OperandReader
) -> Posterior:
    r"""Posterior of A (`which` 0) or of B (`which` 1), B as it would be at scaling `reference`.

    With ratio r = s / s_ref, B_ref = r B has precision S / r^2. A sidecar's prior belongs to the scaling s_t the
    factors were trained with: at the reference it is S_0t (s_ref / s_t)^2, which is exchanged for S_0.
    """
    low_rank = source.low_rank
    assert low_rank is not None  # factor space needs the module in every adapter
    mean, stored = operands.factor(low_rank, which)
    ratio = 1.0 if which == 0 else low_rank.scaling / reference
    trained = low_rank.trained_scaling or low_rank.scaling
    # Scaling 0 gets as far as here only where precisions do not count.
    stretch = 1.0 if which == 0 or trained == 0.0 else (reference / trained) ** 2
    if stored is None:
        precision = _scalar(source.precision, operands) * stretch
    else:
        precision = stored / (source.divisor * ratio**2)
    if source.prior_share is not None or stretch != 1.0:
        share = prior if source.prior_share is None else source.prior_share
        precision = (precision - share * stretch) + prior
    if source.floor is not None:
        precision = precision.clamp(min=source.floor)
    return _posterior(mean * ratio, precision)
