"""Merge one dense tensor that has to be whole in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_bayes.errors import NonFiniteError
from mergekit_bayes.merge.apply import Record, Source, apply_method, floored
from mergekit_bayes.merge.checks import check_block, require_positive
from mergekit_bayes.merge.merged_terms import write_precision
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.sink import Sink
from mergekit_bayes.merge.steps import TensorStep
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.mismatch import mismatch


def run_tensor(step: TensorStep, plan: MergePlan, operands: OperandReader, sink: Sink) -> Record:
    """Merge one tensor and write it.

    Args:
        step: the tensor.
        plan: for the method and the options of the recipe.
        operands: reader of the inputs.
        sink: where the result goes.

    Returns:
        What was measured: what the method reports, mismatch, floored precisions.

    Raises:
        NonFiniteError: an input or the result holds NaN or infinity.
        NonPositivePrecisionError: negative weights take more precision away than there is.
        NumericalError: the method could not do its work.
    """
    if step.numel == 0:
        sink.mean(step.entries[0], torch.empty(step.shape), "the merge")
        sink.precisions({entry: torch.empty(step.shape) for entry in step.precision_entries})
        return {}
    base, sources = _posteriors(step, operands)
    known = zip((source.label for source in step.sources), sources, step.weights, strict=True)
    merged, record = apply_method(plan, step, base, [Source(*each) for each in known])
    if plan.method.precision != "unused":
        precision = merged.precision_tensor().expand_as(merged.mean)
        require_positive(step, precision)
        record |= floored(plan, precision)
        gaps = [float(mismatch(merged.mean, source, base)) for source in sources]
        record["mismatch"] = {source.label: gap for source, gap in zip(step.sources, gaps, strict=True)}
    _write_mean(step, sink, merged.mean.T if step.transposed else merged.mean)
    entries, scale = step.precision_entries, plan.precision_scale
    write_precision(sink, entries, step.terms, merged, scale=scale, transposed=step.transposed)
    return record


def _posteriors(step: TensorStep, operands: OperandReader) -> tuple[Posterior, list[Posterior]]:
    """Base and sources in the orientation of linear layers, their means known to be finite."""
    base = operands.posterior(step.base, step, None)
    sources = [operands.posterior(source, step, base.precision_tensor()) for source in step.sources]
    for operand, posterior in zip((step.base, *step.sources), (base, *sources), strict=True):
        check_block(posterior.mean, step.name, operand.place)
    return base, sources


def _write_mean(step: TensorStep, sink: Sink, mean: Tensor) -> None:
    try:
        sink.mean(step.entries[0], mean, "the merge")
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{step.name}: every input is finite but the merged values are not, or do not fit {step.dtype}; "
            "choose a wider out_dtype, or smaller weights"
        ) from error
