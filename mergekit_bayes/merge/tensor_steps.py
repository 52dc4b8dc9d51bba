"""Which tensors a merge has to see whole, and the step that each becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.merge.curvature import MergedTerms, merged_terms
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import MergeStep, Operand, TensorStep


def merge_step(setting: Setting, step: MergeStep, *, transposed: bool = False) -> MergeStep:
    """The step itself if the merge acts entry by entry, else one that has the whole tensor in memory.

    Args:
        setting: for the method.
        step: the elementwise step.
        transposed: the tensor is the weight of a linear layer and is stored as (in_features, out_features); Kronecker
            factors know better where the weight is not square.
    """
    if not needs_whole(setting, (step.base, *step.sources)):
        return step
    sides = [each.curvature.factors.input.shape[1] for each in step.sources if each.curvature is not None]
    if sides and step.shape[0] != step.shape[1]:
        transposed = sides[0] == step.shape[0]
    known = {each.name: getattr(step, each.name) for each in fields(step)}
    terms = terms_of(setting, step.base, step.sources, step.weights)
    return TensorStep(**known, transposed=transposed, terms=terms, tasks=setting.tasks)


def needs_whole(setting: Setting, operands: Sequence[Operand | None]) -> bool:
    """Whether a merge of these operands has to see all of them at once."""
    whole = not setting.method.in_blocks or bool(setting.tasks)
    return whole or any(each is not None and not each.entrywise for each in operands)


def terms_of(
    setting: Setting, base: Operand, sources: Sequence[Operand | None], weights: Sequence[float]
) -> MergedTerms | None:
    """The Kronecker terms that the merged sidecar has for a weight; None where the merged precision is diagonal.

    What is diagonal in it beside them is written too, unless it is the prior that the metadata have.
    """
    if setting.precision_dtype is None:
        return None
    prior = not isinstance(base.precision, TensorInfo) and setting.recipe.precision.floor is None
    return merged_terms(
        [None if each is None else each.curvature for each in sources],
        weights,
        diagonal=not prior or any(each is not None and _beyond_prior(each, base) for each in sources),
        inputs_only=setting.method.inputs_only,
    )


def _beyond_prior(source: Operand, base: Operand) -> bool:
    factors = source.low_rank is not None and source.low_rank.precision_a is not None
    return factors or source.precision != base.precision
