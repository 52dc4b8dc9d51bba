"""From a recipe to a plan: everything that headers and the recipe can decide, decided before any weight is read.

A plan is data: ordered steps grouped into units of output, with every byte range named. Planning collects all
problems and raises them together; what passes here can only fail for what is in the weights or on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata
from mergekit_bayes.checkpoint.writer import ShardLayout, TensorEntry, layout_shards
from mergekit_bayes.errors import MergekitBayesError, MissingInputError, PlanError, RecipeError
from mergekit_bayes.merge.adapters import adapter_steps
from mergekit_bayes.merge.configuration import output_configuration
from mergekit_bayes.merge.dense import dense_steps
from mergekit_bayes.merge.inputs import Input, belongs, flatten, on_its_base, open_input
from mergekit_bayes.merge.provenance import data_scale, merged_metadata, metadata_strings
from mergekit_bayes.merge.registry import MergeMethod, get_method
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.sidecars import add_notes, normalise_problems, sidecar_problems, task_problems
from mergekit_bayes.merge.steps import CopyStep, Layout, MergeStep, Step, Tasks, Unit
from mergekit_bayes.merge.task import Task, agreed_task
from mergekit_bayes.recipe import MergeRecipe, unused_filter_problems


@dataclass(frozen=True)
class Initial:
    """The file of starting values that an output with new modules comes with.

    Attributes:
        layout: the file.
        tensors: where the values lie now, by name.
    """

    layout: ShardLayout
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        recipe: the validated recipe.
        method: the merge method.
        base: the opened base, or None.
        sources: the opened sources, in the order of the recipe.
        space: "full" (a checkpoint is written), "product" or "factor" (an adapter is written).
        units: output shards with their steps, in output order.
        configuration: the output's config.json or adapter_config.json.
        sidecar: metadata of the merged sidecar, or None where none is written; its mean fingerprint is filled in at
            the end.
        prior: S_0 as a scalar, or None where it comes from the base's sidecar or is not used.
        compute_dtype: "F32" or "F64".
        notes: what the user should know.
        out: output folder, or None while only looking.
        initial: what new modules of the output started from, written beside it; None where there is nothing to tell.
        dropped: tensors of the base that the output has no place for, with the reason, by name.
        task: what the sources were trained to do, as far as they tell.
        tasks: which sources make up one task; nothing where each is one of its own.
    """

    recipe: MergeRecipe
    method: MergeMethod
    base: Input | None
    sources: tuple[Input, ...]
    space: str
    units: tuple[Unit, ...]
    configuration: Mapping[str, object]
    sidecar: SidecarMetadata | None
    prior: float | None
    compute_dtype: str
    notes: tuple[str, ...]
    out: Path | None
    initial: Initial | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)
    task: Task = field(default_factory=Task)
    tasks: Tasks = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps in output order."""
        return tuple(step for unit in self.units for step in unit.steps)

    @property
    def donor(self) -> Input:
        """The input that configuration and tokenizer are taken from: the base, else the first source."""
        return self.base if self.base is not None else self.sources[0]

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Base and sources."""
        return (*((self.base,) if self.base is not None else ()), *self.sources)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights and precisions that will be read."""
        return sum(unit.bytes_read for unit in self.units)

    @property
    def bytes_written(self) -> int:
        """Bytes of weights and precisions that will be written."""
        return sum(unit.bytes_written for unit in self.units)

    @property
    def precision_scale(self) -> float:
        """Factor that brings merged precisions back to data scale before they are written."""
        units = self.sidecar.num_examples if self.sidecar is not None else None
        return data_scale(self.recipe.scale, units)

    @cached_property
    def job(self) -> str:
        """Hex key of everything that decides the output's bytes: a rerun continues only a run with the same key."""
        from mergekit_bayes import __version__

        starts = self.initial.tensors.values() if self.initial is not None else ()
        files = sorted({tensor.path for tensor in (*read_tensors(self), *starts)})
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        anywhere = self.recipe.output.model_copy(update={"path": None})
        key = {
            "version": __version__,
            "recipe": self.recipe.model_copy(update={"output": anywhere}).resolved(),
            "files": stamps,
            "fingerprints": [source.fingerprint for source in self.inputs],
            "scalings": [None if source.adapter is None else source.adapter.scalings for source in self.inputs],
        }
        return hashlib.blake2b(json.dumps(key, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def plan_merge(recipe: MergeRecipe, out: Path | None = None, *, recipe_dir: Path | None = None) -> MergePlan:
    """Plan a merge from the recipe and the headers of its inputs.

    Args:
        recipe: a validated recipe.
        out: output folder; wins over the recipe's `output.path`.
        recipe_dir: folder that relative paths are tried from after the current directory.

    Returns:
        The plan.

    Raises:
        RecipeError: it is a recipe of another kind.
        PlanError: everything that stands in the way, at once.
    """
    if recipe.kind != "merge":  # for callers without a type checker: `load_recipe` reads every kind
        raise RecipeError(f"kind: found `{recipe.kind}`; expected `merge`, the kind that this call plans")
    folder = recipe_dir or Path.cwd()
    setting = _setting(recipe, folder)
    setting.problems.extend(normalise_problems(setting))
    layout = dense_steps(setting) if setting.space == "full" else adapter_steps(setting)
    steps = layout.steps
    _check_filters(setting, steps)
    if not steps and not setting.problems:
        setting.problems.append(MissingInputError("the inputs hold no tensors; expected at least one"))
    if setting.problems:
        raise PlanError(tuple({str(problem): problem for problem in setting.problems}.values()))
    add_notes(setting)
    sidecar = merged_metadata(setting, steps) if any(step.precision_entries for step in steps) else None
    target = out if out is not None else (Path(recipe.output.path) if recipe.output.path is not None else None)
    return MergePlan(
        recipe=recipe,
        method=setting.method,
        base=setting.base,
        sources=setting.sources,
        space=setting.space,
        units=_units(setting, steps, sidecar),
        configuration=output_configuration(setting, layout),
        sidecar=sidecar,
        prior=setting.scalar_prior if setting.needs_prior else None,
        compute_dtype=setting.compute_dtype(steps),
        notes=tuple(dict.fromkeys(setting.notes)),
        out=target,
        initial=_initial(setting, layout),
        dropped=layout.dropped,
        task=setting.task,
        tasks=setting.tasks,
    )


def _setting(recipe: MergeRecipe, folder: Path) -> Setting:
    method = get_method(recipe.merge_method)
    problems: list[MergekitBayesError] = []
    notes: list[str] = []
    base = None
    if recipe.base_model is not None:
        base = _opened(recipe, ("base_model",), recipe.base_model, recipe.precision.prior, folder, problems)
    sources, indices = [], []
    for index, source in enumerate(recipe.models):
        if method.base == "required" and source.model == recipe.base_model:
            notes.append(f"{source.model} is the base and among the models: its task vector is zero, it is left out")
            continue
        opened = _opened(recipe, ("models", index, "model"), source.model, source.precision, folder, problems)
        if opened is not None:
            sources.append(opened)
            indices.append(index)
    if problems:
        raise PlanError(problems)
    space = _space(recipe, method, base, sources, problems)
    expected = base if method.base == "required" else None
    check = on_its_base if method.precision == "unused" else belongs
    problems.extend(problem for opened in sources for problem in check(opened, expected))
    if base is not None and method.prior == "required":
        problems.extend(belongs(base, None))
    problems.extend(sidecar_problems(method, sources, space))
    problems.extend(task_problems(recipe, method))
    task = agreed_task(sources, problems)
    setting = Setting(recipe, method, base, tuple(sources), space, tuple(indices), task, problems, notes)
    if problems:
        raise PlanError(problems)
    return setting


def _opened(
    recipe: MergeRecipe,
    key: tuple[str | int, ...],
    reference: str,
    precision: str | float | bool | None,
    folder: Path,
    problems: list[MergekitBayesError],
) -> Input | None:
    try:
        return open_input(reference, precision, base_dir=folder)
    except MergekitBayesError as error:
        problems.extend(flatten(_located(recipe, key, error)))
        return None


def _located(recipe: MergeRecipe, key: tuple[str | int, ...], error: MergekitBayesError) -> MergekitBayesError:
    place = recipe.where(key)
    located = [type(problem)(f"{place}  {problem}") for problem in flatten(error)]
    return located[0] if len(located) == 1 else PlanError(located)


def _space(
    recipe: MergeRecipe,
    method: MergeMethod,
    base: Input | None,
    sources: list[Input],
    problems: list[MergekitBayesError],
) -> str:
    bare = all(source.checkpoint is None for source in sources)
    space = recipe.space or ("product" if bare else "full")
    if space == "factor" and not method.in_blocks:
        why = f"factor merges A with A and B with B, but {method.name} has to see all of dW; expected product or full"
        problems.append(RecipeError(recipe.describe(("space",), why)))
    if space == "full":
        if base is None and method.base == "required":
            why = f"missing; `{method.name}` needs the base that the models were trained from."
            problems.append(RecipeError(recipe.describe(("base_model",), why)))
        if base is not None and base.checkpoint is None:
            problems.append(MissingInputError(f"base_model: {base.label} is an adapter; expected a full model"))
    elif not all(source.adapter is not None for source in sources):
        dense = ", ".join(source.label for source in sources if source.adapter is None)
        problems.append(
            RecipeError(
                recipe.describe(
                    ("space",),
                    f"{space} merges adapters, but {dense} is a full model; expected adapters, or full",
                )
            )
        )
    return space


def _check_filters(setting: Setting, steps: Sequence[Step]) -> None:
    names = [step.name if isinstance(step, MergeStep) else f"{step.name}.weight" for step in steps]
    names += [step.name for step in steps]
    setting.problems.extend(RecipeError(problem) for problem in unused_filter_problems(setting.recipe, names))


def _units(setting: Setting, steps: Sequence[Step], sidecar: SidecarMetadata | None) -> tuple[Unit, ...]:
    """Group steps into shards; the sidecar is cut where the checkpoint is."""
    stem = "model" if setting.space == "full" else "adapter_model"
    limit = setting.recipe.output.max_shard_size if setting.space == "full" else 1 << 62
    owner = {entry.name: step for step in steps for entry in step.entries}
    layouts = layout_shards(
        [entry for step in steps for entry in step.entries],
        stem=stem,
        max_shard_bytes=limit,
        metadata=metadata_strings(setting, space=setting.space),
    )
    units = []
    for layout in layouts:
        order = {id(owner[entry.name]): owner[entry.name] for entry in layout.entries}
        chosen = sorted(order.values(), key=lambda step: step.name)
        entries = [entry for step in chosen for entry in step.precision_entries]
        units.append(Unit(tuple(chosen), layout, _beside(layout, stem, entries, sidecar)))
    return tuple(units)


def _beside(
    layout: ShardLayout, stem: str, entries: list[TensorEntry], sidecar: SidecarMetadata | None
) -> ShardLayout | None:
    if sidecar is None or not entries:
        return None
    name = layout.filename.replace(stem, "precision", 1)
    (alone,) = layout_shards(entries, max_shard_bytes=1 << 62, metadata=sidecar.to_metadata())
    return ShardLayout(name, alone.entries, alone.metadata)


def _initial(setting: Setting, layout: Layout) -> Initial | None:
    """The start of what is new in the output, so that it can be merged further."""
    if not layout.starts:
        return None
    entries = [TensorEntry(name, tensor.dtype, tensor.shape) for name, tensor in sorted(layout.starts.items())]
    metadata = metadata_strings(setting, space=setting.space, initial=True)
    stem = FRESH_NAME.removesuffix(".safetensors")
    (alone,) = layout_shards(entries, stem=stem, max_shard_bytes=1 << 62, metadata=metadata)
    return Initial(alone, layout.starts)


def copied(plan: MergePlan) -> tuple[CopyStep, ...]:
    """The steps that copy."""
    return tuple(step for step in plan.steps if isinstance(step, CopyStep))


def read_tensors(plan: MergePlan) -> tuple[TensorInfo, ...]:
    """Every tensor that will be read, in step order."""
    return tuple(tensor for step in plan.steps for tensor in step.inputs)
