r"""What-if: how much of what a merge is predicted to cost would richer posteriors remove? From no data at all.

The rule of `mergekit_bayes.posterior` is applied at the weights of the merge to three readings of the same sources,

    isotropic    S_t = S_0, so that  m = theta_0 + sum_t alpha_t (m_t - theta_0)
    diagonal     the diagonal of S_t
    kronecker    S_t with its Kronecker terms, where sources have them

beside what the merge's own method makes of them. All are judged by the same losses, those of the richest posteriors
that the sources have,

    loss_t(m) - loss_t(m_t) = 1/2 (m - m_t)^T (S_t - S_0) (m - m_t) ,

as a family that judged itself would not see what it does not know. The rule with the judge's own posteriors is the
minimum of  sum_t alpha_t [loss_t(m) + 1/2 |m - m_t|^2_{S_0}] + (1 - sum_t alpha_t) 1/2 |m - theta_0|^2_{S_0}, whose
other terms are the prior's: where the prior is weak no other merge costs the sources less together, each times its
weight (Khan, arXiv 2506.14262; Monzon Maldonado et al., arXiv 2412.08147).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.errors import NonPositivePrecisionError, PlanError, RecipeError
from mergekit_bayes.merge.in_place import plan_in_place
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.registry import Merge
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.merge.steps import MergeStep, TensorStep
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior, merge_posteriors, mismatch
from mergekit_bayes.posterior.elementwise import Elementwise
from mergekit_bayes.preview.pieces import Piece, in_layout, own_piece, pieces_of
from mergekit_bayes.recipe import MergeRecipe, load_recipe
from mergekit_bayes.recipe.parameters import Parameters

__all__ = ["AS_MERGED", "FAMILIES", "FamilyCosts", "compare_families"]

FAMILIES = ("isotropic", "diagonal", "kronecker")
"""Poorest first."""

AS_MERGED = "this merge"
"""The row of the merge's own method."""


@dataclass(frozen=True)
class FamilyCosts:
    """What merges of every family are predicted to cost the sources, by the richest posteriors.

    Attributes:
        method: of the merge.
        judge: the family of these posteriors.
        per_unit: whether costs are nats per training unit of their source; else summed over its units.
        by_tensor: predicted loss increase by row (families, and `AS_MERGED`), label of the source, and tensor.
    """

    method: str
    judge: str
    per_unit: bool
    by_tensor: Mapping[str, Mapping[str, Mapping[str, float]]]

    @property
    def labels(self) -> tuple[str, ...]:
        """The sources, in the order of the recipe."""
        return tuple(next(iter(self.by_tensor.values())))

    def cost(self, row: str, label: str) -> float:
        """Predicted loss increase of one source."""
        return sum(self.by_tensor[row][label].values())

    def total(self, row: str) -> float:
        """Predicted loss increase of all sources together."""
        return sum(self.cost(row, label) for label in self.labels)

    def removed(self, row: str) -> float | None:
        """Share of what the isotropic merge costs that another one saves; negative where it costs more."""
        before = self.total("isotropic")
        return 1 - self.total(row) / before if before > 0 else None


def compare_families(
    recipe: MergeRecipe | Path | str | Mapping[str, object], *, recipe_dir: Path | None = None
) -> FamilyCosts:
    """Predicts what merges of every family cost, at the weights of a merge recipe.

    Dense weights of one tensor at a time are read; nothing is written. Low-rank updates of adapters are looked at as
    what they add to the weights, before any cut of rank.

    Args:
        recipe: of the merge, its path or its content.
        recipe_dir: folder that relative paths are tried from after the current directory; by default the recipe's own.

    Raises:
        RecipeError: the recipe cannot be read, or makes several sources one task.
        PlanError: recipe and sources do not fit, or no source has precisions.
        NumericalError: a merged precision that is not positive.
    """
    loaded = recipe
    if not isinstance(loaded, MergeRecipe):
        loaded = load_recipe(loaded, expect=MergeRecipe, methods=method_schemas())
    _refuse_mixtures(loaded)
    folder = loaded.folder if recipe_dir is None else recipe_dir
    dense = loaded.model_copy(update={"space": "full"})
    own = plan_in_place(dense, recipe_dir=folder)
    rule = plan_in_place(_by_the_rule(dense), recipe_dir=folder)
    known = [source for source in rule.sources if source.sidecar is not None or source.scalar_precision is not None]
    if not known:
        raise PlanError(
            [
                RecipeError(
                    "models: no source has a precision, so that nothing tells families apart; expected sidecars beside "
                    "the models or `precision:` (a recipe of kind `precision` estimates one)"
                )
            ]
        )
    return _compare(own, rule)


def _by_the_rule(recipe: MergeRecipe) -> MergeRecipe:
    """The same sources at the same weights, without what the rule has no parameter for."""
    models = tuple(each.model_copy(update={"parameters": _weight_of(each.parameters)}) for each in recipe.models)
    changes = {"merge_method": "posterior", "models": models, "parameters": _weight_of(recipe.parameters)}
    return recipe.model_copy(update=changes)


def _weight_of(parameters: Parameters) -> Parameters:
    return Parameters(tuple((name, value) for name, value in parameters.entries if name == "weight"))


def _refuse_mixtures(recipe: MergeRecipe) -> None:
    named = [source.task for source in recipe.models if source.task is not None]
    twice = next((task for task in named if named.count(task) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"models: several are of the task {shown(twice)}, one mixture; families are compared for sources that "
            "are tasks of their own: leave out `task`"
        )


def _compare(own: MergePlan, rule: MergePlan) -> FamilyCosts:
    mine = {step.name: step for step in own.steps if isinstance(step, MergeStep)}
    labels = [source.label for source in rule.sources]
    tables = {row: {label: dict[str, float]() for label in labels} for row in (*FAMILIES, AS_MERGED)}
    richest = False
    with BlockReader() as reader:
        operands = OperandReader(reader, torch.float64, "cpu")
        for step in rule.steps:
            if not isinstance(step, MergeStep) or step.name not in mine:
                continue
            for piece in pieces_of(step, operands, whole=isinstance(mine[step.name], TensorStep)):
                richest |= not piece.elementwise
                _add(tables, _merges(own, mine[step.name], step, piece, operands), piece, step.name)
    factors, per_unit = _units(rule)
    found = {
        row: {
            label: {name: value * factors[label] for name, value in tensors.items()} for label, tensors in own.items()
        }
        for row, own in tables.items()
        if richest or row != "kronecker"
    }
    return FamilyCosts(own.method.name, "kronecker" if richest else "diagonal", per_unit, found)


def _merges(
    own: MergePlan, mine: MergeStep, step: MergeStep, piece: Piece, operands: OperandReader
) -> dict[str, Tensor]:
    """The merged mean of every row, in the layout of the piece."""
    weights = {source.label: weight for source, weight in zip(mine.sources, mine.weights, strict=True)}
    labels = [label for label in piece.sources if label in weights]
    alpha = torch.tensor([weights[label] for label in labels], dtype=torch.float64)
    floor = own.recipe.precision.floor
    found = {}
    for family in FAMILIES:
        base, *sources = (_read_as(family, each) for each in (piece.base, *(piece.sources[label] for label in labels)))
        merged = merge_posteriors(base, sources, alpha, floor=floor)
        _check(merged, f"{step.name}: the {family} merge")
        found[family] = merged.mean
    theirs = own_piece(mine, step, piece, operands)
    ordered = [theirs.sources[source.label] for source in mine.sources]
    of_method = torch.tensor(mine.weights, dtype=torch.float64)
    kernel = own.method.kernel(theirs.base, ordered, of_method, floor=floor, **dict(mine.options))
    found[AS_MERGED] = in_layout(Merge.of(kernel).posterior.mean, mine, step)
    return found


def _read_as(family: str, posterior: Posterior) -> Posterior:
    """What a family knows of a posterior."""
    if family == "isotropic":
        return Isotropic(posterior.mean, 1.0)
    if family == "diagonal" and not isinstance(posterior, Elementwise):
        return Diagonal.unchecked(posterior.mean, posterior.precision_tensor())
    return posterior


def _check(merged: Posterior, what: str) -> None:
    lowest = float(merged.precision_tensor().min())
    if not lowest > 0:
        raise NonPositivePrecisionError(
            f"{what} has a precision of {lowest:.3g}; expected positive ones; make negative weights smaller, the prior "
            "precision larger, or set precision.floor"
        )


def _add(
    tables: Mapping[str, Mapping[str, dict[str, float]]], means: Mapping[str, Tensor], piece: Piece, name: str
) -> None:
    for row, mean in means.items():
        for label, source in piece.sources.items():
            costs = tables[row][label]
            costs[name] = costs.get(name, 0.0) + float(mismatch(mean, source, piece.base))


def _units(plan: MergePlan) -> tuple[dict[str, float], bool]:
    """What brings the costs of every source to nats per training unit, where the units of all are known."""
    counts = {each.label: each.sidecar.metadata.num_examples if each.sidecar else None for each in plan.sources}
    if plan.recipe.scale == "mean":  # precisions are per unit already
        return dict.fromkeys(counts, 1.0), True
    known = all(counts.values())
    return {label: 1.0 / count if known and count else 1.0 for label, count in counts.items()}, known
