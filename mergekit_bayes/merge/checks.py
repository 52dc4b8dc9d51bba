"""Numbers that must not pass, and the messages that say where they came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from mergekit_bayes.errors import NonFiniteError, NonPositivePrecisionError
from mergekit_bayes.merge.blocks import Formula, Stored, in_chunks
from mergekit_bayes.merge.steps import MergeStep, ModuleStep, weights_by_label

if TYPE_CHECKING:
    from mergekit_bayes.merge.operands import OperandReader


def check_block(block: Tensor, name: str, where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NonFiniteError: naming tensor, place and the share of entries.
    """
    if block.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(block))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        bad = int((~torch.isfinite(block)).sum())
        raise NonFiniteError(
            f"{name}: {bad} of {block.numel()} values in {where} are NaN or infinite; expected finite numbers"
        )


def check_precision(block: Tensor, name: str, where: str) -> None:
    """Refuse precisions that are not positive and finite.

    Raises:
        NonFiniteError: NaN or infinity.
        NonPositivePrecisionError: zero or below.
    """
    if block.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(block))
    if low > 0.0 and high < float("inf"):
        return
    check_block(block, name, where)
    bad = int((block <= 0).sum())
    raise NonPositivePrecisionError(
        f"{name}: {bad} of {block.numel()} precisions in {where} are zero or negative (lowest {low:.3g}); "
        "expected positive numbers"
    )


def diagnose_mean(step: MergeStep, base: Stored, sources: Sequence[Stored]) -> NoReturn:
    """Say which input made a merged mean non-finite, or that the output dtype cannot hold it.

    Raises:
        NonFiniteError: always.
    """
    for operand, stored in zip((step.base, *step.sources), (base, *sources), strict=True):
        check_block(stored.mean, step.name, operand.place)
    raise NonFiniteError(
        f"{step.name}: every input is finite but the merged values are not, or do not fit {step.dtype}; "
        "choose a wider out_dtype, or smaller weights"
    )


def diagnose_precision(
    step: MergeStep,
    operands: OperandReader,
    formula: Formula,
    ranges: Iterable[tuple[int, int]],
    sources: Sequence[Stored],
) -> NoReturn:
    """Count over the whole tensor where the merged precision is not positive, and refuse it.

    Raises:
        NonFiniteError: the precision is NaN or infinite.
        NonPositivePrecisionError: always otherwise.
    """
    exact = replace(formula, precision_dtype=formula.dtype, with_mismatch=False, precision_scale=1.0)
    weights = torch.tensor(step.weights, dtype=torch.float64, device=operands.device)
    lost, lowest = 0, float("inf")
    for start, stop in ranges:
        merged = in_chunks(exact)(*operands.block(step, start, stop), weights)
        assert merged.precision is not None  # asked for above
        assert merged.lowest_precision is not None
        check_infinite = torch.isnan(merged.precision).any()
        if bool(check_infinite):
            check_block(merged.precision, step.name, "the merged precision")
        lost += int((merged.precision <= 0).sum())
        lowest = min(lowest, float(merged.lowest_precision))
    raise lost_precision(step, lost, step.numel, lowest)


def lost_precision(step: MergeStep | ModuleStep, lost: int, count: int, lowest: float) -> NonPositivePrecisionError:
    """The refusal of merged precisions of which some are not positive.

    Args:
        step: the tensor or layer.
        lost: how many are zero or negative.
        count: of how many.
        lowest: the smallest.
    """
    weights = weights_by_label(step)
    shown = ", ".join(f"{label}: {weight:g}" for label, weight in weights.items())
    # Beyond one in total, the weights take the prior away.
    prior = "smaller" if isinstance(step, ModuleStep) and sum(weights.values()) > 1 else "larger"
    return NonPositivePrecisionError(
        f"{step.name}: {lost / count:.1%} of {count} merged precisions are zero or negative "
        f"(lowest {lowest:.3g}) with weights {shown}; expected positive ones; make negative weights smaller, "
        f"prior precision {prior}, or set precision.floor"
    )


def require_positive(step: MergeStep | ModuleStep, precision: Tensor) -> None:
    """Refuse a merged precision, all of it or one number for all, that is not positive everywhere.

    Raises:
        NonPositivePrecisionError: naming the share of entries.
    """
    lost = int((~(precision > 0)).sum())
    if lost:
        raise lost_precision(step, lost, precision.numel(), float(precision.min()))
