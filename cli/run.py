"""`bayes-merge run RECIPE [OUT]`, the default verb: do what a recipe of any kind asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import Changes, Out, Recipe, given_only, load, number_of_bytes, refuse_options
from .evaluate import run_evaluation
from .failure import exit_codes

if TYPE_CHECKING:
    from mergekit_bayes.recipe import FinetuneRecipe, MergeRecipe, PrecisionRecipe
    from mergekit_bayes.recipe.evaluate import EvaluateRecipe
    from mergekit_bayes.recipe.preview import PreviewRecipe


@dataclass(frozen=True)
class _Request:
    """What the command line says besides the recipe itself."""

    out: Path | None
    overwrite: bool
    quiet: bool
    options: Mapping[str, Any]


def run(  # noqa: PLR0913  (one argument per option)
    recipe: Recipe,
    out: Out = None,
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder once the new one is complete.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where a merge's arithmetic happens: cpu, cuda, cuda:1.", metavar="DEVICE", show_default="cpu"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Worker threads of a merge.", show_default="one per core, at most 8")
    ] = None,
    max_memory: Annotated[
        int | None,
        typer.Option(
            parser=number_of_bytes,
            metavar="SIZE",
            help="Memory for a merge's blocks in flight, such as 512MB.",
            show_default="16 MiB of input per thread",
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Fuse a merge's arithmetic with torch.compile.",
            show_default="only for large merges",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    changes: Changes = None,
) -> None:
    """Merge, fine-tune or evaluate models, or estimate their precision, as a recipe says.

    The output folder holds a checkpoint or adapter that from_pretrained loads, its precision sidecar, the
    resolved recipe and a report. It appears when it is complete; a run that was cut short is continued by the
    same command. A precision recipe adds the sidecar to the folder of the model or adapter, or to OUT.
    """
    options = given_only(device=device, threads=threads, max_memory=max_memory, compile=compile)
    with exit_codes():
        from mergekit_bayes.errors import RecipeError

        checked = load(recipe, changes)
        if out is None and checked.output.path is None and checked.kind not in _OWN_OUTPUT:
            hint = "missing; name a folder there, or after the recipe on the command line."
            raise RecipeError(checked.describe(("output", "path"), hint))
    _RUNNERS[checked.kind](checked, _Request(out, overwrite, quiet, options))


def _merge(recipe: MergeRecipe, asked: _Request) -> None:
    with exit_codes(
        interrupted="interrupted; nothing was published. The same command continues from what is finished."
    ):
        from mergekit_bayes.merge.plan import plan_merge

        plan = plan_merge(recipe, asked.out, recipe_dir=recipe.folder)

        from mergekit_bayes.merge.run import run_merge

        watched = not asked.quiet and sys.stderr.isatty()
        result = run_merge(plan, overwrite=asked.overwrite, progress=watched, **asked.options)
        if not asked.quiet and result.report:  # only the leading process of several has one
            print(result.summary())


def _finetune(recipe: FinetuneRecipe, asked: _Request) -> None:
    refuse_options(recipe.kind, asked.options, "`accelerate launch` says where, and in how many processes, it runs.")
    with exit_codes(
        interrupted="interrupted; nothing was published. The same command continues from the last checkpoint."
    ):
        from mergekit_bayes.finetune.run import finetune

        result = finetune(recipe, asked.out, overwrite=asked.overwrite, progress=not asked.quiet)
        if not asked.quiet and result.report:  # only the leading process of several has one
            print(result.summary())


def _precision(recipe: PrecisionRecipe, asked: _Request) -> None:
    instead = "the recipe has `max_memory`, and `accelerate launch` says where, and in how many processes, it runs."
    refuse_options(recipe.kind, asked.options, instead)
    with exit_codes(interrupted="interrupted; nothing was published. The same command continues from what was saved."):
        from mergekit_bayes.estimate.run import estimate_precision

        result = estimate_precision(recipe, asked.out, overwrite=asked.overwrite, progress=not asked.quiet)
        if not asked.quiet and result.report:  # only the leading process of several has one
            print(result.summary())


def _preview(recipe: PreviewRecipe, asked: _Request) -> None:
    refuse_options(recipe.kind, asked.options, "the recipe's `evaluation` says where and how mixes are evaluated.")
    with exit_codes():
        from mergekit_bayes.preview.run import preview

        result = preview(recipe, asked.out, overwrite=asked.overwrite, progress=not asked.quiet)
        if not asked.quiet and result.front:  # only the leading process of several has one
            print(result.summary())


def _evaluate(recipe: EvaluateRecipe, asked: _Request) -> None:
    refuse_options(recipe.kind, asked.options, "`accelerate launch` says where, and in how many processes, it runs.")
    run_evaluation(recipe, asked.out, overwrite=asked.overwrite, quiet=asked.quiet)


_OWN_OUTPUT = ("precision", "evaluate")
"""Kinds that need no output folder: they have one already, or print what they found."""

_RUNNERS: Mapping[str, Callable[[Any, _Request], None]] = {
    "merge": _merge,
    "finetune": _finetune,
    "precision": _precision,
    "preview": _preview,
    "evaluate": _evaluate,
}
"""What runs the recipes of each kind."""
