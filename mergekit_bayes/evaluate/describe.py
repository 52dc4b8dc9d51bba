"""What an evaluation recipe will do, before any weight is loaded: headers are read, the impossible is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.data.locate import HubDataset, locate
from mergekit_bayes.errors import MergekitBayesError, PlanError
from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.evaluate.candidates import open_candidates
from mergekit_bayes.evaluate.variants import variants_of
from mergekit_bayes.predict.harness import check_installed
from mergekit_bayes.recipe import dump_yaml
from mergekit_bayes.recipe.data import DatasetSpec
from mergekit_bayes.recipe.evaluate import METRICS, EvaluateRecipe

__all__ = ["describe"]


def describe(recipe: EvaluateRecipe) -> str:
    """Returns what a recipe will look at, on which data, and the recipe with all defaults.

    Raises:
        PlanError: every reason found why it cannot be carried out: no such model, sidecar or data, labels that differ,
            an output folder that must not be written.
    """
    problems: list[MergekitBayesError] = []
    lines: list[str] = []
    parts: tuple[tuple[str, Callable[[EvaluateRecipe], Iterator[str]]], ...] = (
        ("models", _models),
        ("data", _data),
        ("lm_eval", _harness),
        ("output", _output),
    )
    for name, part in parts:
        try:
            lines += [f"{name if not number else '':<8}{line}" for number, line in enumerate(part(recipe))]
        except PlanError as error:
            problems += error.problems
        except MergekitBayesError as error:
            problems.append(error)
    if problems:
        raise PlanError(problems)
    return "\n".join(lines) + "\n\n" + dump_yaml(recipe.resolved())


def _models(recipe: EvaluateRecipe) -> Iterator[str]:
    task, candidates = open_candidates(recipe, recipe_dir=recipe.folder)
    for candidate in candidates:
        yield f"{candidate.title}: {', '.join(_ways(recipe, candidate))}; {candidate.about}"
    if recipe.data is None:
        return
    yield f"for {task}: {', '.join(recipe.metrics or METRICS[task])}"
    if len(candidates) > 1:
        yield f"compared with {recipe.baseline_title}"


def _ways(recipe: EvaluateRecipe, candidate: Candidate) -> Iterator[str]:
    for variant in variants_of(recipe, candidate):
        if variant.samples:
            chosen = variant.temperature is None
            at = "chosen by the validation rows" if chosen else f"{variant.temperature:g}"
            under = "" if variant.prior is None else f" under prior {variant.prior:g}"
            yield f"{variant.samples} samples at temperature {at}{under}"
        else:
            yield f"pruned by {variant.prune:g}" if variant.prune else "at its mean"


def _data(recipe: EvaluateRecipe) -> Iterator[str]:
    if recipe.data is None:
        return
    problems: list[MergekitBayesError] = []
    chosen = [] if recipe.validation is None else [(spec, " (validation)") for spec in recipe.validation.eval]
    for spec, role in [*((spec, "") for spec in recipe.data.eval), *chosen]:
        try:
            yield _data_set(spec, recipe.folder) + role
        except MergekitBayesError as error:
            problems.append(error)
    if problems:
        raise PlanError(problems)
    packed = ", packed" if recipe.data.packing else ""
    yield f"rows of at most {recipe.data.max_length} tokens{packed}"


def _harness(recipe: EvaluateRecipe) -> Iterator[str]:
    """The tasks by name; whether there are such is known when the harness is asked, which takes seconds."""
    spec = recipe.lm_eval
    if spec is None:
        return
    check_installed()
    told = [", ".join(spec.tasks)]
    told += [] if spec.num_fewshot is None else [f"{spec.num_fewshot} solved examples before each question"]
    told += [] if spec.limit is None else [f"limit {spec.limit:g}"]
    told += [] if spec.include_path is None else [f"task files in {spec.include_path}"]
    yield "; ".join(told)


def _data_set(spec: DatasetSpec, folder: Path | None) -> str:
    found = locate(spec, folder)
    return f"{spec.path} (hub), split {spec.split}" if isinstance(found, HubDataset) else spec.path


def _output(recipe: EvaluateRecipe) -> Iterator[str]:
    if recipe.output.path is None:
        yield "none: a table is printed"
        return
    target = Path(recipe.output.path)
    present = target.is_dir() and any(target.iterdir())
    OutputFolder(target, overwrite=True, inputs=[], job="plan").check()
    noted = " (is not empty; replaced only with --overwrite)" if present else ""
    yield f"{target}{noted}: results, rows, figures"
