"""The merges of a preview: one plan per method, from headers alone, whose weights are then those of any mix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_bayes.errors import MergekitBayesError, PlanError, RecipeError
from mergekit_bayes.merge.in_place import plan_in_place
from mergekit_bayes.merge.inputs import flatten
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.merge.steps import CopyStep, ModuleStep, Step
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.recipe import MergeRecipe, load_recipe
from mergekit_bayes.recipe.merge import SourceSpec
from mergekit_bayes.recipe.preview import MethodSpec, PreviewOutputSpec, PreviewRecipe, Space
from mergekit_bayes.recipe.scalar import Scalar

__all__ = ["MethodPlan", "curvature_plan", "merge_recipe", "plan_corners", "plan_methods", "plan_references"]

CORNERS = "corners"
"""Title of the method that gives the base and the experts themselves."""


@dataclass(frozen=True)
class MethodPlan:
    """A method of a preview with its merge, planned at weights of one.

    Attributes:
        spec: as in the recipe.
        plan: the merge.
    """

    spec: MethodSpec
    plan: MergePlan

    @property
    def title(self) -> str:
        """What plots and tables call the method."""
        return self.spec.title

    def effective(self, mix: Mix) -> Mix:
        """The weights that the method's kernel is given at a mix, in the order of the recipe.

        Raises:
            MethodError: weights the method cannot use.
        """
        found = self.plan.recipe.parameters
        plain = {name: value for name, value in found.items() if name != "weight" and isinstance(value, Scalar)}
        return self.plan.method.effective_weights(mix, plain)

    def steps_at(self, mix: Mix) -> Iterator[Step]:
        """The steps of the merge at a mix."""
        labels = [source.label for source in self.plan.sources]
        weights = dict(zip(labels, self.effective(mix), strict=True))
        yield from (reweighted(step, weights) for step in self.plan.steps)


def reweighted(step: Step, weights: Mapping[str, float]) -> Step:
    """A step with other effective weights, by the labels of the sources."""
    if isinstance(step, CopyStep):
        return step
    if isinstance(step, ModuleStep):  # one place per source, sorted by label; empty where it leaves the module alone
        return replace(step, weights=tuple(weights[label] for label in sorted(weights)))
    return replace(step, weights=tuple(weights[source.label] for source in step.sources))


def merge_recipe(recipe: PreviewRecipe, method: MethodSpec, mix: Sequence[float]) -> MergeRecipe:
    """The checked merge recipe of one mix."""
    return load_recipe(recipe.merge_of(method, mix), expect=MergeRecipe, methods=method_schemas())


def plan_methods(
    recipe: PreviewRecipe, recipe_dir: Path | None = None, *, space: Space | None = None
) -> tuple[MethodPlan, ...]:
    """Plans the merges of all methods.

    Args:
        recipe: of the preview.
        recipe_dir: folder that relative paths are tried from after the current directory; by default the recipe's.
        space: what of adapters is merged; None for what the recipe says.

    Raises:
        PlanError: everything that stands in the way of any of them, at once.
    """
    folder = recipe.folder if recipe_dir is None else recipe_dir
    problems: list[MergekitBayesError] = []
    plans = []
    for method in recipe.compared:
        try:
            merge = merge_recipe(recipe, method, [1.0] * len(recipe.models))
            merge = merge if space is None else merge.model_copy(update={"space": space})
            problems += _unplain(merge)
            plans.append(MethodPlan(method, plan_in_place(merge, recipe_dir=folder)))
        except MergekitBayesError as error:
            problems += [type(each)(f"{method.title}: {each}") for each in flatten(error)]
    if problems:
        raise PlanError(tuple({str(problem): problem for problem in problems}.values()))
    return tuple(plans)


def plan_corners(recipe: PreviewRecipe, recipe_dir: Path | None = None) -> MethodPlan:
    """The method whose mixes are the base, at zero, and the experts, each alone.

    Raises:
        PlanError: everything that stands in its way.
    """
    space = "full" if recipe.space == "full" else None
    spec = MethodSpec.model_construct(merge_method="task_arithmetic", name=CORNERS, space=space)
    only = recipe.model_copy(update={"methods": (spec,), "merge_method": None})
    return plan_methods(only, recipe_dir)[0]


def plan_references(recipe: PreviewRecipe, recipe_dir: Path | None = None) -> dict[int, MethodPlan]:
    """The references that are models, by their places: each is the method whose mix (1,) is that model itself.

    Raises:
        PlanError: everything that stands in the way of any of them, at once.
    """
    problems: list[MergekitBayesError] = []
    plans = {}
    for index, reference in enumerate(recipe.references):
        if reference.model is None:
            continue
        spec = MethodSpec.model_construct(merge_method="task_arithmetic", name=f"references[{index}]")
        source = SourceSpec.model_construct(model=reference.model)
        # no rank of merged adapters: a reference is looked at as it is
        update = {"models": (source,), "methods": (spec,), "merge_method": None, "space": None}
        only = recipe.model_copy(update={**update, "output": PreviewOutputSpec()})
        try:
            (plans[index],) = plan_methods(only, recipe_dir)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    return plans


def curvature_plan(recipe: PreviewRecipe, recipe_dir: Path | None = None) -> MergePlan:
    """The plan that says which curvature the posterior of every source has: that of the rule, on dense weights.

    Raises:
        PlanError: the sources and the recipe do not say what their posteriors are.
    """
    folder = recipe.folder if recipe_dir is None else recipe_dir
    rule = next((each for each in recipe.compared if each.merge_method == "posterior"), None)
    shared = MethodSpec.model_construct(
        merge_method="posterior",
        space="full",
        scale=None if rule is None else rule.scale,
        precision=None if rule is None else rule.precision,
    )
    merge = merge_recipe(recipe, shared, [1.0] * len(recipe.models))
    return plan_in_place(merge, recipe_dir=folder)


def _unplain(merge: MergeRecipe) -> Iterator[RecipeError]:
    """Parameters that differ between layers, where the weights of the whole model depend on them."""
    ruled = get_method(merge.merge_method).weight_rule is not None
    for name, value in merge.parameters.items():
        if ruled and name != "weight" and not isinstance(value, Scalar):
            yield RecipeError(f"parameters.{name}: differs between layers; a preview needs one value for all of them")
