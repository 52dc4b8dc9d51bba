"""Which tensors a merge has to see whole, and the step that each becomes."""

from __future__ import annotations

from dataclasses import fields

from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import MergeStep, TensorStep


def merge_step(setting: Setting, step: MergeStep, *, transposed: bool = False) -> MergeStep:
    """The step itself if the merge acts entry by entry, else one that has the whole tensor in memory.

    Args:
        setting: for the method.
        step: the elementwise step.
        transposed: the tensor is the weight of a linear layer and is stored as (in_features, out_features).
    """
    if setting.method.scope == "element":
        return step
    return TensorStep(**{each.name: getattr(step, each.name) for each in fields(step)}, transposed=transposed)
