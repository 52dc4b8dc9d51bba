"""Call a merge method on whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # exported without saying so

from mergekit_bayes.errors import MethodError, NumericalError
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.registry import Merge
from mergekit_bayes.merge.steps import ModuleStep, TensorStep
from mergekit_bayes.posterior import Posterior

Record = dict[str, Any]


def apply_method(
    plan: MergePlan,
    step: TensorStep | ModuleStep,
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Sequence[float],
) -> Merge:
    """The merge of one tensor by the plan's method, with the recipe's floor and the step's options.

    Args:
        plan: for the method and the floor.
        step: the step that the tensor belongs to.
        base: the base with the prior precision.
        sources: the task posteriors.
        weights: one per source.

    Raises:
        NumericalError: a decomposition failed, or the method refused the numbers; the message names the tensor.
        MethodError: the method refused its inputs.
    """
    alpha = torch.tensor(weights, dtype=torch.float64, device=base.mean.device)
    floor = plan.recipe.precision.floor if plan.method.precision != "unused" else None
    try:
        return Merge.of(plan.method.kernel(base, sources, alpha, floor=floor, **dict(step.options)))
    except LinAlgError as error:
        raise NumericalError(
            f"{step.name}: a decomposition in {plan.method.name} failed ({str(error).splitlines()[0]}); the inputs are "
            "finite, so try dtype: float64"
        ) from error
    except (MethodError, NumericalError) as error:
        raise type(error)(f"{step.name}: {error}") from error


def floored(plan: MergePlan, *precisions: Tensor) -> Record:
    """How many of the merged precisions the recipe's floor raised; nothing without one."""
    floor = plan.recipe.precision.floor
    if floor is None:
        return {}
    raised = sum(int((precision <= floor).sum()) for precision in precisions)
    return {"floored_entries": raised, "entries": sum(precision.numel() for precision in precisions)}


def labelled(measures: Mapping[str, float | Mapping[str, float]], labels: Sequence[str]) -> Record:
    """Measures of a method for the report, those by position of a source under the source's label.

    Args:
        measures: as the method returned them.
        labels: of the sources that it was given, in their order.
    """
    return {
        name: {labels[int(position)]: float(number) for position, number in value.items()}
        if isinstance(value, Mapping)
        else value
        for name, value in measures.items()
    }
