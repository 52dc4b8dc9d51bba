"""`bayes-merge plan RECIPE [OUT]`: what a recipe would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .arguments import Changes, Out, Recipe, given_only, load, refuse_options
from .failure import exit_codes

if TYPE_CHECKING:
    from mergekit_bayes.recipe import FinetuneRecipe, MergeRecipe, PrecisionRecipe
    from mergekit_bayes.recipe.evaluate import EvaluateRecipe
    from mergekit_bayes.recipe.preview import PreviewRecipe


def plan(
    recipe: Recipe,
    out: Out = None,
    *,
    steps: Annotated[
        bool | None,
        typer.Option("--steps/--no-steps", help="List every tensor of a merge.", show_default="steps"),
    ] = None,
    changes: Changes = None,
) -> None:
    """Show what a recipe would read, do and write.

    Whatever a recipe and, for a merge, the headers of its inputs show to be impossible is refused here, all of it
    at once.
    """
    with exit_codes():
        checked = load(recipe, changes)
        print(_PLANS[checked.kind](checked, out, given_only(steps=steps)).rstrip("\n"))


def _merge(recipe: MergeRecipe, out: Path | None, options: Mapping[str, Any]) -> str:
    from mergekit_bayes.merge.plan import plan_merge
    from mergekit_bayes.merge.plan_text import plan_text

    return plan_text(plan_merge(recipe, out, recipe_dir=recipe.folder), **{"steps": True, **options})


def _finetune(recipe: FinetuneRecipe, out: Path | None, options: Mapping[str, Any]) -> str:
    refuse_options(recipe.kind, options, "it has no list of tensors.")

    from mergekit_bayes.finetune.run import describe

    return describe(_to(recipe, out))


def _precision(recipe: PrecisionRecipe, out: Path | None, options: Mapping[str, Any]) -> str:
    refuse_options(recipe.kind, options, "it has no list of tensors.")

    from mergekit_bayes.estimate.describe import describe

    return describe(_to(recipe, out))


def _preview(recipe: PreviewRecipe, out: Path | None, options: Mapping[str, Any]) -> str:
    refuse_options(recipe.kind, options, "it has no list of tensors.")

    from mergekit_bayes.preview.describe import describe

    return describe(_to(recipe, out))


def _evaluate(recipe: EvaluateRecipe, out: Path | None, options: Mapping[str, Any]) -> str:
    refuse_options(recipe.kind, options, "it has no list of tensors.")

    from mergekit_bayes.evaluate.describe import describe

    return describe(_to(recipe, out))


R = TypeVar("R", "FinetuneRecipe", "PrecisionRecipe", "PreviewRecipe", "EvaluateRecipe")


def _to(recipe: R, out: Path | None) -> R:
    """The recipe with the output folder of the command line."""
    if out is None:
        return recipe
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"path": str(out)})})


_PLANS: Mapping[str, Callable[[Any, Path | None, Mapping[str, Any]], str]] = {
    "merge": _merge,
    "finetune": _finetune,
    "precision": _precision,
    "preview": _preview,
    "evaluate": _evaluate,
}
"""What describes the recipes of each kind."""
