"""What a recipe will do, before anything is loaded: headers and names are read, and what cannot work is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.disk import format_bytes
from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.data.locate import HubDataset, LocalFiles, find, locate
from mergekit_bayes.errors import MergekitBayesError, PlanError
from mergekit_bayes.finetune.trackers import check_trackers
from mergekit_bayes.model.base_identity import open_base
from mergekit_bayes.recipe import dump_yaml

if TYPE_CHECKING:
    from mergekit_bayes.recipe.finetune import DatasetSpec, FinetuneRecipe

__all__ = ["describe", "local_inputs"]

_FLOAT_BYTES = 4
_COPIES = {"ivon": 5, "adamw": 4}
"""Float32 numbers per trained weight: itself, its gradient, two of state; and the mean, while IVON samples."""


def describe(recipe: FinetuneRecipe) -> str:
    """Returns what a recipe will read, do and write, and the recipe with all defaults.

    Raises:
        PlanError: every reason found why it cannot be carried out: no such base or data, a tracker that is not
            installed, an output folder that must not be written.
    """
    problems: list[MergekitBayesError] = []
    parts: tuple[tuple[str, Callable[[FinetuneRecipe], str]], ...] = (
        ("model", _model),
        ("data", _data),
        ("train", _training),
        ("output", _output),
    )
    lines = []
    for name, part in parts:
        try:
            text = part(recipe)
        except PlanError as error:
            problems += error.problems
        except MergekitBayesError as error:
            problems.append(error)
        else:
            lines += [f"{name if not number else '':<8}{line}" for number, line in enumerate(text.splitlines())]
    if problems:
        raise PlanError(problems)
    return "\n".join(lines) + "\n\n" + dump_yaml(recipe.resolved())


def local_inputs(recipe: FinetuneRecipe, recipe_dir: Path | None) -> list[Path]:
    """Returns the files and folders that a run reads, as far as they are local."""
    named = [recipe.model.path, *(data_set.path for data_set in (*recipe.data.train, *recipe.data.eval))]
    found = (find(name, recipe_dir) for name in named)
    return [path for path in found if path is not None]


def _model(recipe: FinetuneRecipe) -> str:
    spec, adapter = recipe.model, recipe.adapter
    # a model of the hub is not fetched for a plan
    weights = None if find(spec.path, recipe.folder) is None else _weights(spec.path, recipe.folder)
    known = "of the hub" if weights is None else f"{weights[0]:,} weights stored as {weights[1]}"
    bits = 4 if spec.load_in_4bit else 8 if spec.load_in_8bit else None
    loaded = f", loaded in {bits} bits" if bits else ""
    lines = [f"{spec.path}: {known}{loaded}, for {spec.task}"]
    if adapter is not None:
        targets = adapter.target_modules if isinstance(adapter.target_modules, str) else "the modules named"
        lines.append(f"a LoRA adapter of rank {adapter.r} on {targets} is trained")
    else:
        size = "" if weights is None else _size(weights[0] * _FLOAT_BYTES * _COPIES[recipe.optimizer.name])
        lines.append(f"all weights are trained{size}")
    return "\n".join(lines)


def _weights(path: str, recipe_dir: Path | None) -> tuple[int, str]:
    """How many weights a base has, and the types they are stored as."""
    tensors = open_base(path, recipe_dir=recipe_dir)[0].tensors.values()
    return sum(info.numel for info in tensors), "/".join(sorted({info.dtype for info in tensors}))


def _size(count: int) -> str:
    return f": {format_bytes(count)} with gradients and optimizer"


def _data(recipe: FinetuneRecipe) -> str:
    return "\n".join(_data_lines(recipe))


def _data_lines(recipe: FinetuneRecipe) -> Iterator[str]:
    problems: list[MergekitBayesError] = []
    data = recipe.data
    for role, sets in (("train", data.train), ("eval", data.eval)):
        for spec in sets:
            try:
                yield f"{role}: {_data_set(spec, recipe.folder)}"
            except MergekitBayesError as error:
                problems.append(error)
    if problems:
        raise PlanError(problems)
    if data.eval_fraction is not None:
        yield f"eval: {data.eval_fraction:.3g} of the training rows"
    packed = ", packed" if data.packing else ""
    yield f"rows of at most {data.max_length} tokens{packed}; longer ones: {data.long_rows}"


def _data_set(spec: DatasetSpec, folder: Path | None) -> str:
    found = locate(spec, folder)
    if isinstance(found, HubDataset):
        return f"{spec.path} (hub), split {spec.split}"
    if isinstance(found, LocalFiles) and len(found.paths) > 1:
        return f"{spec.path}: {len(found.paths)} {found.kind} files"
    return spec.path


def _training(recipe: FinetuneRecipe) -> str:
    spec, optimizer = recipe.training, recipe.optimizer
    check_trackers(spec.report_to)
    length = f"{spec.max_steps} steps" if spec.max_steps > 0 else f"{spec.num_train_epochs:g} epochs"
    cut = f" in {spec.gradient_accumulation_steps} micro-batches" if spec.gradient_accumulation_steps > 1 else ""
    rows = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    warmup = f", warm-up {spec.warmup_steps:g}" if spec.warmup_steps else ""
    lines = [f"{length} of {rows} rows per process{cut}, lr {optimizer.lr:g} {spec.lr_scheduler_type}{warmup}"]
    if optimizer.name == "ivon":
        options = {"ess": optimizer.ess, "hess_init": optimizer.hess_init, "beta2": optimizer.beta2}
        given = [f"{name} {value:g}" for name, value in options.items() if value is not None]
        derived = [name for name, value in options.items() if value is None]
        if derived:
            noise = f"noise of {optimizer.noise_to_weight:g} of the weights"
            given.append(f"{', '.join(derived)} from the run, temperature {optimizer.temperature:g} and {noise}")
        lines.append(f"IVON: {'; '.join(given)}")
    else:
        lines.append("AdamW: leaves no precision behind")
    return "\n".join(lines)


def _output(recipe: FinetuneRecipe) -> str:
    path, spec = recipe.output.path, recipe.training
    if path is not None:
        OutputFolder(Path(path), overwrite=True, inputs=local_inputs(recipe, recipe.folder), job="plan").check()
    sidecar = f", precisions in {recipe.output.precision}" if _has_sidecar(recipe) else ""
    what = "adapter" if recipe.adapter is not None else "model"
    often = f"every {spec.save_steps} steps and at the end" if spec.save_steps else "at the end"
    kept = f", the newest {spec.save_total_limit} kept" if spec.save_total_limit else ""
    present = " (exists; replaced only with --overwrite)" if path is not None and _is_filled(Path(path)) else ""
    place = "OUT, named on the command line" if path is None else f"{path}{present}"
    return f"{place}: {what}{sidecar}, recipe, log, loss curve, report\ncheckpoints {often}{kept}"


def _has_sidecar(recipe: FinetuneRecipe) -> bool:
    return recipe.optimizer.name == "ivon" and recipe.output.precision is not False


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
