"""`bayes-merge merge RECIPE [OUT]`, the default verb."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .arguments import Changes, Out, Recipe, load, number_of_bytes
from .failure import exit_codes

CONTINUE = "interrupted; nothing was published. The same command continues from what is finished."


def merge(  # noqa: PLR0913  (one argument per option)
    recipe: Recipe,
    out: Out = None,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder once the new one is complete.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the arithmetic happens: cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Worker threads.", show_default="one per core, at most 8")
    ] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(
            parser=number_of_bytes,
            metavar="SIZE",
            help="Memory for blocks in flight, such as 512MB.",
            show_default="16 MiB of input per thread",
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Fuse the arithmetic with torch.compile.",
            show_default="only for large merges",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    changes: Changes = None,
) -> None:
    """Merge models as a recipe says.

    The output folder holds a checkpoint or adapter that from_pretrained loads, its precision sidecar, the
    resolved recipe and a report. It appears when it is complete; a run that was cut short is continued by the
    same command.
    """
    with exit_codes(interrupted=CONTINUE):
        from mergekit_bayes.errors import RecipeError
        from mergekit_bayes.merge.plan import plan_merge

        checked = load(recipe, changes)
        if out is None and checked.output.path is None:
            hint = "missing; name a folder there, or after the recipe on the command line."
            raise RecipeError(checked.describe(("output", "path"), hint))
        plan = plan_merge(checked, out, recipe_dir=recipe.parent)

        from mergekit_bayes.merge.run import run_merge

        result = run_merge(
            plan,
            overwrite=overwrite,
            device=device,
            threads=threads,
            max_memory=max_memory,
            compile=compile,
            progress=not quiet and sys.stderr.isatty(),
        )
        if not quiet and result.report:  # only the leading process of several has one
            print(result.summary())
