"""From an evaluation recipe to scores, and a folder that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.checkpoint.disk import write_atomically
from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.data import Task
from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.evaluate.candidates import open_candidates
from mergekit_bayes.evaluate.encodings import Encodings
from mergekit_bayes.evaluate.harnessed import Harnessed, answer_lines, harness_results, open_harness
from mergekit_bayes.evaluate.outcome import Outcome
from mergekit_bayes.evaluate.pictures import draw_reliability, draw_scores
from mergekit_bayes.evaluate.processes import make_accelerator
from mergekit_bayes.evaluate.results import results_of, results_text, results_without_rows
from mergekit_bayes.evaluate.session import Found, Session
from mergekit_bayes.evaluate.store import ANSWERS_NAME, ROWS_FOLDER, Store, write_rows
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.recipe import dump_yaml, load_recipe
from mergekit_bayes.recipe.evaluate import EvaluateRecipe

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables

__all__ = ["EvaluateResult", "evaluate"]

RESULTS_NAME, RECIPE_NAME = "results.json", "evaluate_recipe.yaml"
SCORES_NAME, RELIABILITY_NAME = "scores.png", "reliability.png"
_JOB = "evaluate 1"  # the same for all recipes: what is remembered says itself what it depends on


@dataclass(frozen=True)
class EvaluateResult:
    """A finished evaluation.

    Attributes:
        folder: holds results, rows and figures; None if none was asked for.
        results: the content of `results.json`; empty in every process but the leading one.
    """

    folder: Path | None
    results: Mapping[str, Any]

    def value(self, model: str, data: str, metric: str) -> float:
        """One score.

        Raises:
            EvaluateError: there is none of that name.
        """
        try:
            return float(self.results["scores"][model][data][metric]["value"])
        except KeyError as error:
            raise EvaluateError(f"results: there is no {error} for {model}, {data}, {metric}") from error


def evaluate(
    recipe: EvaluateRecipe | Path | str | Mapping[str, Any],
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
    recipe_dir: Path | None = None,
    tables: Tables | None = None,
) -> EvaluateResult:
    """Evaluates models on data.

    The folder appears when it is complete. A run that was cut short goes on with the same call, also after the recipe
    was changed: numbers are known by the weights, rows and settings they depend on. Under `torchrun` or `accelerate
    launch` every process calls this; they share the rows, and the result is that of one process.

    Args:
        recipe: path of a recipe, its content as a dictionary, or a loaded one.
        out: output folder; wins over the recipe's `output.path`. Without either nothing is written.
        overwrite: replace an output folder that is there, once the new one is complete; numbers in it that still
            hold are not computed again.
        progress: show on standard error how far it is.
        recipe_dir: folder that relative paths are tried from after the current one; by default the recipe's own.
        tables: data sets in memory (lists of mappings, or `datasets.Dataset`), by the path that stands for them in the
            recipe.

    Returns:
        The finished evaluation.

    Raises:
        RecipeError: the recipe cannot be read; every problem at once.
        MergekitBayesError: models or data that do not fit, numbers or a disk that failed; nothing existing was touched.
        KeyboardInterrupt: Ctrl-C; the same call goes on from what was finished.
    """
    loaded = _loaded(recipe)
    places = recipe_dir if recipe_dir is not None else loaded.folder
    accelerator = make_accelerator()
    task, candidates = open_candidates(loaded, recipe_dir=places)
    folder = _folder(loaded, candidates, out, overwrite=overwrite, leader=accelerator.is_main_process)
    # what is wrong with the data is said before anything is computed
    encodings = _encodings(loaded, task, candidates, places, tables)
    tasks = open_harness(loaded, task, places)
    with folder if folder is not None else nullcontext():
        accelerator.wait_for_everyone()  # the leader has prepared the folder
        store = Store(folder, None if folder is None else folder.target)
        harness = Harnessed(loaded, tasks, store, accelerator)
        session = Session(loaded, task, encodings, harness, store, accelerator)
        found = session.run(candidates, show=progress and accelerator.is_main_process)
        if not accelerator.is_main_process:
            return EvaluateResult(None if folder is None else folder.target, {})
        results = _results(loaded, task, candidates, found) | harness_results(tasks, found.answers)
        if folder is not None:
            _write(folder.staging, loaded, found, results)
            folder.publish()
    return EvaluateResult(None if folder is None else folder.target, results)


def _loaded(recipe: EvaluateRecipe | Path | str | Mapping[str, Any]) -> EvaluateRecipe:
    if isinstance(recipe, EvaluateRecipe):
        return recipe
    return load_recipe(recipe, expect=EvaluateRecipe, methods=method_schemas())


def _encodings(
    recipe: EvaluateRecipe, task: Task, candidates: Sequence[Candidate], places: Path | None, tables: Tables | None
) -> Encodings | None:
    if recipe.data is None:
        return None
    encodings = Encodings(recipe, task, places, tables)
    for candidate in candidates:
        encodings.of(candidate)
    return encodings


def _results(recipe: EvaluateRecipe, task: Task, candidates: Sequence[Candidate], found: Found) -> dict[str, Any]:
    if found.outcomes:
        return results_of(recipe, task, found.outcomes)
    return results_without_rows(recipe, task, candidates)


def _folder(
    recipe: EvaluateRecipe, candidates: Sequence[Candidate], out: Path | str | None, *, overwrite: bool, leader: bool
) -> OutputFolder | None:
    named = out if out is not None else recipe.output.path
    if named is None:
        return None
    inputs = [place for candidate in candidates for place in candidate.places]
    folder = OutputFolder(Path(named), overwrite=overwrite, inputs=inputs, job=_JOB, leader=leader, precious=True)
    if leader:
        folder.recover()
        folder.check()
    return folder


def _write(staging: Path, recipe: EvaluateRecipe, found: Found, results: Mapping[str, Any]) -> None:
    if found.outcomes:
        _write_rows(staging, found.outcomes)
        draw_scores(staging / SCORES_NAME, results)
    if "lm_eval" in results:
        write_atomically(staging / ANSWERS_NAME, "".join(f"{line}\n" for line in answer_lines(found.answers)).encode())
    write_atomically(staging / RECIPE_NAME, dump_yaml(recipe.resolved()).encode())
    if "reliability" in results:
        draw_reliability(staging / RELIABILITY_NAME, results)
    write_atomically(staging / RESULTS_NAME, results_text(results).encode())


def _write_rows(staging: Path, outcomes: Sequence[Outcome]) -> None:
    (staging / ROWS_FOLDER).mkdir(exist_ok=True)
    for number, outcome in enumerate(outcomes):
        head = {"key": outcome.key, "title": outcome.title}
        write_rows(staging / ROWS_FOLDER / f"{number:02d}.jsonl", head, outcome.measured)
