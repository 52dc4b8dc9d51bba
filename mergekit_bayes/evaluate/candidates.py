"""The models of an evaluation, opened by their headers; what cannot be evaluated together is refused at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.adapter import is_adapter, open_adapter
from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.checkpoint.reference import parse_reference, resolve
from mergekit_bayes.checkpoint.sidecar import check_sidecar, find_sidecar, open_sidecar
from mergekit_bayes.data import ModelTask, Task, model_task
from mergekit_bayes.errors import EvaluateError, MergekitBayesError, ModelError, PlanError, RecipeError
from mergekit_bayes.evaluate.candidate import Candidate, Stored
from mergekit_bayes.evaluate.merged import open_merged
from mergekit_bayes.model.trained import open_trained
from mergekit_bayes.recipe.evaluate import METRICS, EvaluatedSpec, EvaluateRecipe

__all__ = ["open_candidates"]


def open_candidates(recipe: EvaluateRecipe, *, recipe_dir: Path | None) -> tuple[Task, list[Candidate]]:
    """Opens every model.

    Args:
        recipe: what was asked for.
        recipe_dir: where relative paths may start beside the current directory.

    Returns:
        What all models do, and the models in the order of the recipe.

    Raises:
        PlanError: everything that is wrong with any of them: not there, no sidecar to sample or prune by, another task,
            labels that the others do not have.
        RecipeError: metrics of another task.
    """
    problems: list[MergekitBayesError] = []
    found: list[Candidate] = []
    for index, spec in enumerate(recipe.models):
        try:
            found.append(_open(recipe, index, spec, recipe_dir))
        except PlanError as error:
            problems += error.problems
        except MergekitBayesError as error:
            problems.append(error)
    problems += _no_precision(recipe, found)
    tasks = {candidate.title: candidate.task for candidate in found}
    if problems:
        raise PlanError(problems)
    task = _common_task(recipe, tasks)
    if task == "sequence_classification":
        found = _with_labels(recipe, found)
    return task, found


def _open(recipe: EvaluateRecipe, index: int, spec: EvaluatedSpec, recipe_dir: Path | None) -> Candidate:
    here = Path() if recipe_dir is None else recipe_dir
    if spec.model is None:
        return open_merged(recipe, index, spec, here)
    model, adapter = _parts(recipe, spec, spec.model, here)
    trained = open_trained(model, adapter, recipe_dir=recipe_dir)
    if isinstance(spec.precision, str):
        sidecar: Path | None = _existing(recipe, index, spec.precision, here)
    else:
        sidecar = None if spec.precision is False else find_sidecar(trained.folder)
    return Stored(spec, recipe.samples_of(spec), sidecar, None, home=model, trained=trained)


def _existing(recipe: EvaluateRecipe, index: int, path: str, here: Path) -> Path:
    for place in (Path(path).absolute(), here.absolute() / path):
        if place.exists():
            return open_sidecar(place).path
    raise RecipeError(recipe.describe(("models", index, "precision"), f"there is no {shown(path)}."))


def _parts(recipe: EvaluateRecipe, spec: EvaluatedSpec, model: str, here: Path) -> tuple[str, str | None]:
    """References of a model and of the adapter on it."""
    parsed = parse_reference(model, base_dir=here)
    if parsed.adapter is not None:
        return _joined(parsed.model, parsed.revision), _joined(parsed.adapter, parsed.adapter_revision)
    folder = resolve(parsed.model, parsed.revision, base_dir=here).path
    if not is_adapter(folder):
        return model, None
    named = spec.base_model or recipe.base_model
    if named is not None:
        return named, model
    known = open_adapter(folder, reference=model).config.get("base_model_name_or_path")
    if not isinstance(known, str) or not known:
        raise ModelError(f"adapter {shown(model)}: does not name its base; add `base_model`")
    beside = folder.parent / known  # what was saved with a relative path names a neighbour
    return (str(beside) if not Path(known).exists() and beside.is_dir() else known), model


def _joined(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def _no_precision(recipe: EvaluateRecipe, found: Sequence[Candidate]) -> Iterator[MergekitBayesError]:
    """Reasons why a model cannot be sampled or pruned, before hours went into its mean."""
    for candidate in found:
        asked = "samples" if candidate.samples is not None else "prune" if recipe.prune else None
        if asked is None:
            continue
        if isinstance(candidate, Stored) and candidate.sidecar is not None:
            yield from _unfit(candidate, candidate.sidecar, pruned=bool(recipe.prune))
            continue
        advice = "`samples: false` for this model" if asked == "samples" else "no `prune`"
        if isinstance(candidate, Stored):
            yield EvaluateError(
                f"model {shown(candidate.title)}: has no precision sidecar, which `{asked}` needs; expected "
                f"precision.safetensors beside the weights, a path as `precision`, or {advice}. A recipe of kind "
                "`precision` estimates one"
            )
        else:
            yield EvaluateError(
                f"model {shown(candidate.title)}: is merged in memory, at its mean alone, and `{asked}` needs its "
                f"precisions; write the merge to disk with bayes-merge and name its folder as `model`, or {advice}"
            )


def _unfit(candidate: Stored, path: Path, *, pruned: bool) -> Iterator[MergekitBayesError]:
    sidecar, trained = open_sidecar(path), candidate.trained
    if pruned and sidecar.metadata.space == "product":
        seen = f"model {shown(candidate.title)}: {shown(sidecar.path)} has precisions of the adapter's updates"
        yield EvaluateError(f"{seen} (space product), whose entries no file holds; expected no `prune`")
    if candidate.samples is not None and candidate.samples.prior is not None and not sidecar.metadata.prior_precision:
        seen = f"model {shown(candidate.title)}: {shown(sidecar.path)} does not say which prior is in its precisions"
        yield EvaluateError(f"{seen}; expected its prior_precision, or no `samples.prior`")
    yield from check_sidecar(
        sidecar,
        mean_tensors=trained.tensors,
        mean_fingerprint=trained.fingerprint,
        base_fingerprint=trained.base[1],
        adapter=trained.adapter,
    )


def _common_task(recipe: EvaluateRecipe, tasks: Mapping[str, ModelTask | None]) -> Task:
    known: dict[str, ModelTask] = {title: found for title, found in tasks.items() if found is not None}
    told = recipe.told_task
    task: Task = told if told is not None else next(iter(known.values()), "causal_lm")
    other = [title for title, found in known.items() if found != model_task(task)]
    if other:
        where = "`task` is" if told else f"{shown(next(iter(known)))} is for"
        raise EvaluateError(
            f"models for different tasks: {where} {task}, {listed(other)} for {known[other[0]]}; expected models of "
            "one task, in one recipe each"
        )
    strange = [name for name in recipe.metrics or () if name not in METRICS[task]]
    if strange:
        expected = f"expected some of {', '.join(METRICS[task])}."
        raise RecipeError(recipe.describe(("metrics",), f"models of `{task}` have no {listed(strange)}; {expected}"))
    return task


def _with_labels(recipe: EvaluateRecipe, found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with the names of their outputs, which are the same set for all of them."""
    labelled, problems = [], list[MergekitBayesError]()
    for candidate in found:
        labels = candidate.known_labels or _named(recipe, candidate, problems)
        labelled.append(candidate.with_labels(labels))
    named = None if recipe.data is None else recipe.data.labels
    wanted = named or labelled[0].labels or ()
    for candidate in labelled:
        if candidate.labels is not None and set(candidate.labels) != set(wanted):
            other = "`data.labels`" if named else shown(labelled[0].title)
            problems.append(
                EvaluateError(
                    f"model {shown(candidate.title)}: its labels are {listed(candidate.labels)}; those of {other} are "
                    f"{listed(wanted)}; expected one set of labels for all models and the data"
                )
            )
    if problems:
        raise PlanError(problems)
    return labelled


def _named(recipe: EvaluateRecipe, candidate: Candidate, problems: list[MergekitBayesError]) -> tuple[str, ...] | None:
    """Labels of a model whose files only count them: those of the recipe, else their numbers."""
    stored = candidate.config.get("id2label")
    count = len(stored) if isinstance(stored, dict) else 2
    given = None if recipe.data is None else recipe.data.labels
    if given is None:
        return tuple(str(number) for number in range(count))
    if len(given) != count and candidate.has_own_head:
        problems.append(
            EvaluateError(
                f"model {shown(candidate.title)}: has {count} outputs, `data.labels` has {len(given)} names; expected "
                "a name for each"
            )
        )
        return None
    return given
