"""`bayes-merge plan RECIPE [OUT]`: what a merge would do, from headers alone."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import Changes, Out, Recipe, load
from .failure import exit_codes


def plan(
    recipe: Recipe,
    out: Out = None,
    *,
    steps: Annotated[bool, typer.Option("--steps/--no-steps", help="List every tensor.")] = True,
    changes: Changes = None,
) -> None:
    """Show what a merge would read, do and write, from headers alone.

    Whatever recipe and headers show to be impossible is refused here, all of it at once.
    """
    with exit_codes():
        from mergekit_bayes.merge.plan import plan_merge
        from mergekit_bayes.merge.plan_text import plan_text

        checked = load(recipe, changes)
        print(plan_text(plan_merge(checked, out, recipe_dir=recipe.parent), steps=steps))
