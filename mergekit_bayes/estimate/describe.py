"""What a precision recipe will do, before any weight is loaded: headers and names are read, the impossible refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.disk import format_bytes
from mergekit_bayes.checkpoint.sidecar import find_sidecar
from mergekit_bayes.data.locate import HubDataset, LocalFiles, find, locate
from mergekit_bayes.errors import MergekitBayesError, PlanError
from mergekit_bayes.estimate.folder import SidecarFolder
from mergekit_bayes.estimate.run import target_of
from mergekit_bayes.model.trained import Trained, open_trained
from mergekit_bayes.precision.registry import EstimatorSpec, get_estimator
from mergekit_bayes.recipe import dump_yaml

if TYPE_CHECKING:
    from mergekit_bayes.recipe.data import DatasetSpec
    from mergekit_bayes.recipe.precision import PrecisionRecipe

__all__ = ["describe"]

_BYTES = {"float32": 4, "bfloat16": 2}
_MOST_ROWS = 65_536  # of a weight that is taken for a linear layer's: an embedding has one for every word


def describe(recipe: PrecisionRecipe) -> str:
    """Returns what a recipe will read, estimate and write, and the recipe with all defaults.

    Raises:
        PlanError: every reason found why it cannot be carried out: no such model, adapter or data, an output folder
            that must not be written.
    """
    problems: list[MergekitBayesError] = []
    lines: list[str] = []
    trained: list[Trained] = []
    parts: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
        ("model", lambda: _model(recipe, trained)),
        ("data", lambda: _data(recipe)),
        ("passes", lambda: _passes(recipe, trained)),
        ("output", lambda: _output(recipe, trained)),
    )
    for name, part in parts:
        try:
            lines += [f"{name if not number else '':<8}{line}" for number, line in enumerate(part())]
        except PlanError as error:
            problems += error.problems
        except MergekitBayesError as error:
            problems.append(error)
    if problems:
        raise PlanError(problems)
    return "\n".join(lines) + "\n\n" + dump_yaml(recipe.resolved())


def _model(recipe: PrecisionRecipe, trained: list[Trained]) -> Iterator[str]:
    spec = recipe.model
    bits = 4 if spec.load_in_4bit else 8 if spec.load_in_8bit else None
    loaded = f", loaded in {bits} bits" if bits else ""
    for reference in filter(None, (spec.path, recipe.adapter)):
        if find(reference, recipe.folder) is None:  # one of the hub is not fetched for a plan
            yield f"{reference}: of the hub, for {spec.task}{loaded}"
            return
    found = open_trained(spec.path, recipe.adapter, recipe_dir=recipe.folder)
    trained.append(found)
    weights = sum(info.numel for info in found.checkpoint.tensors.values())
    dtypes = "/".join(sorted({info.dtype for info in found.checkpoint.tensors.values()}))
    yield f"{spec.path}: {weights:,} weights stored as {dtypes}{loaded}, for {spec.task}"
    if found.adapter is not None:
        factors = sum(info.numel for info in found.tensors.values())
        yield f"{recipe.adapter}: a LoRA adapter of {len(found.adapter.modules)} modules, {factors:,} weights"


def _data(recipe: PrecisionRecipe) -> Iterator[str]:
    if recipe.data is None:
        yield f"none; the state of Adam in {recipe.optimizer_state}"
        return
    problems: list[MergekitBayesError] = []
    for spec in recipe.data.train:
        try:
            yield _data_set(spec, recipe.folder)
        except MergekitBayesError as error:
            problems.append(error)
    if problems:
        raise PlanError(problems)
    packed = ", packed" if recipe.data.packing else ""
    yield f"at most {recipe.num_examples:,} rows of at most {recipe.data.max_length} tokens{packed}"


def _data_set(spec: DatasetSpec, folder: Path | None) -> str:
    found = locate(spec, folder)
    if isinstance(found, HubDataset):
        return f"{spec.path} (hub), split {spec.split}"
    if isinstance(found, LocalFiles) and len(found.paths) > 1:
        return f"{spec.path}: {len(found.paths)} {found.kind} files"
    return spec.path


def _passes(recipe: PrecisionRecipe, trained: list[Trained]) -> Iterator[str]:
    spec = get_estimator(recipe.estimator.name)
    yield f"{spec.name} ({spec.family}) in {recipe.space} space: {spec.summary}"
    if trained:
        count = _entries(recipe, trained[0], spec)
        most = recipe.max_memory
        groups = "" if most is None or most >= 4 * count else f", at most {format_bytes(most)} of them in one pass"
        about = "about " if spec.factors and recipe.space == "full" else ""
        verb = "read" if spec.source == "state" else "summed up"
        yield f"{about}{count:,} numbers are {verb}: {format_bytes(4 * count)}{groups}"
    units = "the units looked at" if recipe.training_units is None else f"{recipe.training_units:,}"
    yield f"N = {units}, prior precision N x {recipe.prior.weight_decay:g}"


def _entries(recipe: PrecisionRecipe, trained: Trained, spec: EstimatorSpec) -> int:
    if recipe.space == "factor" or (recipe.space == "full" and not spec.factors):
        return sum(info.numel for info in trained.tensors.values() if info.floating)
    if trained.adapter is not None:
        shapes = [(module.b.shape[0], module.a.shape[1]) for module in trained.adapter.modules.values()]
        rest = sum(info.numel for info in trained.adapter.saved.values())
    else:
        flat = [info for info in trained.tensors.values() if info.floating]
        shapes = [(i.shape[0], i.shape[1]) for i in flat if len(i.shape) == 2 and i.shape[0] <= _MOST_ROWS]
        rest = sum(i.numel for i in flat if len(i.shape) != 2 or i.shape[0] > _MOST_ROWS)
    return rest + sum(_of_layer(shape, spec, recipe) for shape in shapes)


def _of_layer(shape: tuple[int, int], spec: EstimatorSpec, recipe: PrecisionRecipe) -> int:
    if not spec.factors:
        return shape[0] * shape[1]
    corrected = shape[0] * shape[1] if recipe.estimator.options.plain().get("eigenvalues") else 0
    sides = {"output": shape[0], "input": shape[1]}
    return corrected + sum(sides[side] ** 2 for side in spec.factors)


def _output(recipe: PrecisionRecipe, trained: list[Trained]) -> Iterator[str]:
    if not trained:
        yield recipe.output.path or "OUT, named on the command line"
        return
    target = target_of(recipe, trained[0], None)
    SidecarFolder(target, overwrite=True).check()
    present = target.is_dir() and find_sidecar(target) is not None
    noted = " (has a sidecar; replaced only with --overwrite)" if present else ""
    figure = "" if recipe.data is None else ", figure"
    yield f"{target}{noted}: sidecar in {recipe.output.precision}, report{figure}"
