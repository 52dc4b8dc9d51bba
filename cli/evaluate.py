"""`bayes-merge evaluate MODEL...`: how good models are, without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failure import exit_codes

if TYPE_CHECKING:
    from mergekit_bayes.recipe.evaluate import EvaluateRecipe

INTERRUPTED = "interrupted; nothing was published. The same command continues from what was finished."


def evaluate(  # noqa: PLR0913  (one argument per option)
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub id of a model, an adapter or a merge, as NAME=MODEL or MODEL[+ADAPTER]; or a merge "
            "recipe (.yaml), which is merged in memory.",
            show_default=False,
        ),
    ],
    *,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="Rows to evaluate on; may be repeated.", show_default=False),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval", metavar="TASK", help="Task of lm-eval-harness; may be repeated.", show_default="none"
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Solved examples before each question of the harness.", show_default="the task's"
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="N", help="Documents of each task of the harness, or a share.", show_default="all"),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Task files for the harness.", show_default="its own")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where results and figures go.", show_default="none")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Base of adapters.", show_default="what they name")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="causal_lm, sequence_classification or multiple_choice.",
            show_default="what the models say",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Also average over so many samples of the posterior.", show_default="none"
        ),
    ] = None,
    temperature: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="Of the samples, or `validation`.", show_default="1.0"),
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER", help="Precision of the samples where the data say nothing.", show_default="the sidecar's"
        ),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option("--validation", metavar="PATH", help="Rows that choose the temperature.", show_default="none"),
    ] = None,
    prune: Annotated[
        list[float] | None,
        typer.Option("--prune", metavar="SHARE", help="Also prune so many of the weights.", show_default="none"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME", help="What to report; may be repeated.", show_default="all"),
    ] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Tokens per row.", show_default="1024")] = None,
    max_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Only so many rows of each file, evenly spread.", show_default="all")
    ] = None,
    packing: Annotated[bool, typer.Option("--packing", help="Join texts and cut them into full rows.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Rows in one forward pass.", show_default="16")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="What models compute in.", show_default="float32")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of samples and resampling.", show_default="0")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output folder once the new one is complete.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Score models and merges on data, and compare them with the first.

    Language models get loss, perplexity and bits per byte, classifiers and answers to multiple-choice questions
    accuracy, calibration and more, each with a bootstrap interval of the difference. A recipe of kind `evaluate`
    says the same in a file, and more.
    """
    common = {"max_length": max_length, "packing": packing or None}
    content = {
        "kind": "evaluate",
        "models": [_model(text) for text in models],
        "base_model": base_model,
        "task": task,
        "data": _given(eval=[{"path": path} for path in data], **common) if data else None,
        "lm_eval": _given(tasks=lm_eval, num_fewshot=num_fewshot, limit=limit, include_path=include_path) or None,
        "max_rows": max_rows,
        "validation": _given(eval=[{"path": path} for path in validation], **common) if validation else None,
        "samples": _samples(samples, temperature, prior),
        "prune": prune or None,
        "metrics": metric or None,
        "batch_size": batch_size,
        "dtype": dtype,
        "seed": seed,
    }
    with exit_codes():
        from mergekit_bayes.recipe import load_recipe
        from mergekit_bayes.recipe.evaluate import EvaluateRecipe

        recipe = load_recipe(_given(**content), expect=EvaluateRecipe)
        run_evaluation(recipe, out, overwrite=overwrite, quiet=quiet)


def run_evaluation(recipe: EvaluateRecipe, out: Path | None, *, overwrite: bool, quiet: bool) -> None:
    """Evaluate, and print tables.

    Args:
        recipe: what was asked for.
        out: output folder; wins over the recipe's.
        overwrite: whether a folder may be replaced.
        quiet: print errors only.
    """
    with exit_codes(interrupted=INTERRUPTED):
        from mergekit_bayes.evaluate.run import evaluate as run

        result = run(recipe, out, overwrite=overwrite, progress=not quiet)
        if not quiet and result.results:  # only the leading process of several has some
            from mergekit_bayes.evaluate.table import print_results

            print_results(result.results)
            if result.folder is not None:
                print(f"{result.folder}: results.json{', rows, figures' if result.results['data'] else ''}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _model(text: str) -> dict[str, str]:
    """A model, or a name for it in front of an equals sign; a folder with such a name is a folder."""
    name, mark, reference = text.partition("=")
    if not mark or Path(text).exists() or not name or not reference:
        return {_kind(text): text}
    return {_kind(reference): reference, "name": name}


def _kind(reference: str) -> str:
    return "merge" if reference.endswith((".yaml", ".yml")) and not Path(reference).is_dir() else "model"


def _samples(count: int | None, temperature: str | None, prior: float | None) -> dict[str, Any] | None:
    if count is None and temperature is None and prior is None:
        return None
    try:
        value: object = None if temperature is None else float(temperature)
    except ValueError:
        value = temperature
    return _given(count=count, temperature=value, prior=prior)
