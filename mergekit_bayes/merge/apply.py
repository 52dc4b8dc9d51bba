"""Call a merge method on whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # exported without saying so

from mergekit_bayes.errors import MethodError, NumericalError
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.registry import Merge
from mergekit_bayes.merge.steps import ModuleStep, TensorStep
from mergekit_bayes.posterior import Mixture, Posterior

Record = dict[str, Any]


class Source(NamedTuple):
    """One source of a tensor: the posterior, its weight, and what messages and reports call it."""

    label: str
    posterior: Posterior
    weight: float


def apply_method(
    plan: MergePlan, step: TensorStep | ModuleStep, base: Posterior, sources: Sequence[Source]
) -> tuple[Posterior, Record]:
    """The merge of one tensor by the plan's method, with the recipe's floor and the step's options.

    Args:
        plan: for the method and the floor.
        step: the step that the tensor belongs to; sources of one of its tasks become one mixture.
        base: the base with the prior precision.
        sources: the task posteriors.

    Returns:
        The merged posterior, and what the method measured, by the labels of the sources where it did so for each.

    Raises:
        NumericalError: a decomposition failed, or the method refused the numbers; the message names the tensor.
        MethodError: the method refused its inputs.
    """
    tasks, names = _tasks(step, sources)
    alpha = torch.tensor([task.weight for task in tasks], dtype=torch.float64, device=base.mean.device)
    floor = plan.recipe.precision.floor if plan.method.precision != "unused" else None
    try:
        found = plan.method.kernel(base, [task.posterior for task in tasks], alpha, floor=floor, **dict(step.options))
    except LinAlgError as error:
        raise NumericalError(
            f"{step.name}: a decomposition in {plan.method.name} failed ({str(error).splitlines()[0]}); the inputs are "
            "finite, so try dtype: float64"
        ) from error
    except (MethodError, NumericalError) as error:
        raise type(error)(f"{step.name}: {error}") from error
    merged, measures = Merge.of(found)
    return merged, _labelled(measures, names)


def _tasks(step: TensorStep | ModuleStep, sources: Sequence[Source]) -> tuple[list[Source], dict[str, str]]:
    """The sources as the method sees them, and the label that each position in its measures stands for.

    The components of a mixture are alike: nobody knows which of several trainings of one task is right.
    """
    known = {source.label: source for source in sources}
    tasks: list[Source] = []
    names: dict[str, str] = {}
    for name, labels in step.tasks or tuple((source.label, (source.label,)) for source in sources):
        parts = [known[label] for label in labels if label in known]
        names |= {str(len(tasks)): name, **{f"{len(tasks)}.{k}": part.label for k, part in enumerate(parts)}}
        tasks.append(
            parts[0]
            if len(parts) == 1
            else Source(name, Mixture.unchecked([part.posterior for part in parts]), parts[0].weight)
        )
    return tasks, names


def floored(plan: MergePlan, *precisions: Tensor) -> Record:
    """How many of the merged precisions the recipe's floor raised; nothing without one."""
    floor = plan.recipe.precision.floor
    if floor is None:
        return {}
    raised = sum(int((precision <= floor).sum()) for precision in precisions)
    return {"floored_entries": raised, "entries": sum(precision.numel() for precision in precisions)}


def _labelled(measures: Mapping[str, float | Mapping[str, float]], names: Mapping[str, str]) -> Record:
    """Measures of a method for the report, those by position of a source under its name."""
    return {
        key: {names[position]: float(number) for position, number in value.items()}
        if isinstance(value, Mapping)
        else value
        for key, value in measures.items()
    }
