"""What a preview would do, from the recipe and the headers of its sources."""

from __future__ import annotations

from pathlib import Path

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.predict.harness import check_installed
from mergekit_bayes.preview.designs import design_size
from mergekit_bayes.preview.page import check_page
from mergekit_bayes.preview.plans import MethodPlan, curvature_plan, plan_methods, plan_references
from mergekit_bayes.recipe.preview import PreviewRecipe

__all__ = ["describe"]


def describe(recipe: PreviewRecipe, recipe_dir: Path | None = None) -> str:
    """The plan of a preview, for a terminal.

    Raises:
        RecipeError: plotly, which the recipe asks for, is not installed.
        EvaluateError: nor is lm-eval-harness.
        PlanError: recipe and sources do not fit; every problem at once.
    """
    check_page(recipe)
    if any(task.lm_eval is not None for task in recipe.tasks):
        check_installed()
    folder = recipe.folder if recipe_dir is None else recipe_dir
    plans = plan_methods(recipe, folder)
    references = len(plan_references(recipe, folder))
    size, budget = design_size(recipe), recipe.budget
    lines = [f"preview of {len(recipe.models)} models on the tasks {', '.join(recipe.task_names)}"]
    lines += [f"  {plan.title}: {_how(plan)}" for plan in plans]
    lines.append(f"design: {size} mixes of {len(plans)} methods, {size * len(plans)} in all")
    if "surrogate" in recipe.fidelity:
        lines.append(f"predicted by the posteriors: all of them{_obstacle(recipe, folder)}")
    if "evaluated" in recipe.fidelity:
        wanted = size * len(plans)
        points = wanted if budget.points is None else min(budget.points, wanted)
        skipped = f", {wanted - points} skipped for the budget" if points < wanted else ""
        models = f", and {references} references" if references else ""
        lines.append(f"evaluated: {points} mixes{skipped}, and base and experts{models}")
        if budget.minutes is not None:
            lines.append(f"  as many as {budget.minutes:g} minutes allow, those that cover the design first")
    lines.append(f"output: {recipe.output.path or 'to be named after the recipe'}")
    return "\n".join(lines)


def _how(plan: MethodPlan) -> str:
    adapters = all(source.checkpoint is None for source in plan.plan.sources)
    what = "adapters" if adapters else "checkpoints"
    return f"{plan.plan.method.name} of {what} in {plan.plan.space} space"


def _obstacle(recipe: PreviewRecipe, folder: Path | None) -> str:
    try:
        curvature_plan(recipe, folder)
    except MergekitBayesError as error:
        return f"; but that will fail: {error}"
    return ""
