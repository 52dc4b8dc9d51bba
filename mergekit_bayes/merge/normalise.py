r"""Bring the curvatures of the sources to one size, where a recipe asks for it (`precision.normalise: trace`).

Sidecars of different estimators, or of trainings of different length, can differ in scale by orders of magnitude, and
the largest then decides a merge alone. With h_t the mean of the diagonal of H_t = S_t - S_0 over all entries that the
sidecar of source t covers, and h the mean of these over the sources,

    S_t  <-  S_0 + (h / h_t) H_t .

Ratios between the tensors of one source stay as they are, and so does the total of the curvatures. It costs one more
pass over the sidecars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from mergekit_bayes.checkpoint.dtypes import torch_dtype
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.errors import NumericalError
from mergekit_bayes.merge.lora import product_precision, row_blocks
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.steps import CopyStep, MergeStep, ModuleStep, Operand, Step

BLOCK = 1 << 22


def curvature_divisors(plan: MergePlan) -> dict[str, float]:
    """What the curvature of every source with a sidecar is divided by, by its label; nothing unless asked for.

    Raises:
        NumericalError: a source's mean curvature is not positive, or a precision is no precision.
    """
    if not plan.recipe.precision.normalise:
        return {}
    traces: dict[str, list[tuple[float, int]]] = {}
    with BlockReader() as reader:
        operands = OperandReader(reader, torch_dtype(plan.compute_dtype), "cpu")
        for step in plan.steps:
            if isinstance(step, CopyStep):
                continue
            for operand in step.sources:
                if operand is not None and operand.of_sidecar:
                    found = _trace(operand, step, operands, _share(operand, step.base))
                    traces.setdefault(operand.label, []).append(found)
    means = {label: sum(t for t, _ in parts) / sum(n for _, n in parts) for label, parts in sorted(traces.items())}
    for label, mean in means.items():
        if not mean > 0.0:
            raise NumericalError(
                f"{label}: its curvature is {mean:.3g} on average; expected a positive one to normalise"
            )
    overall = sum(means.values()) / max(1, len(means))
    return {label: mean / overall for label, mean in means.items()}


def with_divisors(step: Step, divisors: Mapping[str, float]) -> Step:
    """The step with the curvatures of its sources divided.

    Args:
        step: as planned.
        divisors: from `curvature_divisors`.
    """
    if isinstance(step, CopyStep) or not divisors:
        return step
    sources = tuple(
        each if each is None or not each.of_sidecar else _divided(each, step.base, divisors[each.label])
        for each in step.sources
    )
    return replace(step, sources=sources)  # type: ignore[arg-type]  # None only where there was None


def _share(operand: Operand, base: Operand) -> float:
    """The prior within an operand's own diagonal precision, as it is after its divisor."""
    if operand.prior_share is not None:
        return operand.prior_share
    return base.precision if isinstance(base.precision, float) else 0.0


def _divided(operand: Operand, base: Operand, divisor: float) -> Operand:
    terms = operand.curvature
    if terms is not None:
        operand = replace(operand, curvature=replace(terms, divisor=terms.divisor * divisor))
    if terms is not None and operand.precision == base.precision:
        return operand  # the prior's diagonal beside its terms
    share = _share(operand, base) / divisor if isinstance(operand.precision, TensorInfo) else operand.prior_share
    return replace(operand, divisor=operand.divisor * divisor, prior_share=share)


def _trace(operand: Operand, step: MergeStep | ModuleStep, operands: OperandReader, share: float) -> tuple[float, int]:
    """The sum of the diagonal of H over the entries of a tensor, and their number."""
    total, count = 0.0, 0
    if operand.curvature is not None:
        shape = _shape(step)
        terms = operands.terms(operand.curvature)
        total += sum(float(term.diagonal().double().expand(shape).sum()) for term in terms)
        count = shape[0] * shape[1]
    if isinstance(operand.precision, TensorInfo) and operand.precision != step.base.precision:
        tensor = operand.precision
        for start in range(0, tensor.numel, BLOCK):
            block = operands.precision_block(tensor, start, min(BLOCK, tensor.numel - start))
            total += float(block.double().sum()) / operand.divisor - share * block.numel()
        count = tensor.numel
    elif operand.low_rank is not None and operand.low_rank.precision_a is not None:
        factors = operands.factors(operand.low_rank)
        rows, columns = factors.b.shape[0], factors.a.shape[1]
        parts = [float(product_precision(factors, each).double().sum()) for each in row_blocks((rows, columns))]
        total, count = sum(parts) / operand.divisor, rows * columns
    return total, count


def _shape(step: MergeStep | ModuleStep) -> torch.Size:
    """Of the layer as (out, in) or the other way round, which has as many entries and the same diagonal's sum."""
    if isinstance(step, ModuleStep):
        return torch.Size((step.out_features, step.in_features))
    transposed = getattr(step, "transposed", False)
    return torch.Size(step.shape[::-1] if transposed else step.shape)
