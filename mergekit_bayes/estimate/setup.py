"""Everything a precision pass consists of, made from its recipe; what does not fit together is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.data import load_training_data, misfit, packing_fault
from mergekit_bayes.errors import DataError, MissingTensorError, ModelError
from mergekit_bayes.estimate.rows import Feed
from mergekit_bayes.model.tokens import load_tokenizer
from mergekit_bayes.model.trained import Trained, load_trained, parameter_names
from mergekit_bayes.precision.registry import EstimatorSpec, get_estimator
from mergekit_bayes.precision.targets import Targets, find_targets

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.data import TrainingData
    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.model import LoadedModel
    from mergekit_bayes.recipe.precision import PrecisionRecipe

__all__ = ["load_data", "load_model", "make_accelerator", "make_feed", "targets_of"]


def make_accelerator() -> Accelerator:
    """Returns what knows devices and processes.

    Raises:
        ModelError: the launch asks for a sharded model.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # a training of the same process may have wanted another precision; device and processes stay what they are
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="no")
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ModelError(
            f"launch: {kind}: a precision pass keeps a whole model in every process; launch without it, and make the "
            "model smaller with `model.load_in_4bit: true` and an adapter, or with `model.dtype: bfloat16`"
        )
    return accelerator


def load_data(
    recipe: PrecisionRecipe, trained: Trained, *, recipe_dir: Path | None, tables: Tables | None
) -> TrainingData:
    """Reads the rows of a recipe, with the labels that the model knows.

    Raises:
        DataError: they cannot be read, or have labels that the model does not know.
    """
    assert recipe.data is not None  # the recipe was checked
    tokenizer = load_tokenizer(trained.checkpoint.folder, reference=recipe.model.path)
    spec = recipe.data
    if recipe.model.task == "sequence_classification" and spec.labels is None and trained.labels is not None:
        spec = spec.model_copy(update={"labels": trained.labels})
    data = load_training_data(spec, tokenizer, task=recipe.model.task, recipe_dir=recipe_dir, tables=tables)
    if not len(data.train):
        raise DataError("data.train: holds no row; expected at least one")
    return data


def load_model(
    recipe: PrecisionRecipe, trained: Trained, *, labels: tuple[str, ...] | None, accelerator: Accelerator
) -> LoadedModel:
    """Puts the model of a recipe into memory, on the device of this process."""
    return load_trained(trained, recipe.model, labels=labels, device=accelerator.device)


def make_feed(recipe: PrecisionRecipe, loaded: LoadedModel, data: TrainingData, accelerator: Accelerator) -> Feed:
    """Returns what deals the rows.

    Raises:
        DataError: a token, a position or packed rows that the model has no place for.
    """
    rows, name = data.train, recipe.model.path
    longest = int(rows.lengths.max(initial=0))
    fault = misfit(
        name,
        largest_token=rows.largest_token,
        longest=longest,
        vocabulary=loaded.vocabulary,
        longest_row=loaded.longest_row,
    )
    if fault is not None:
        raise DataError(fault)
    if rows.packed:
        fault = packing_fault(loaded.model, vocabulary=rows.largest_token + 1, flatten=False)
        if fault is not None:
            raise DataError(f"data.packing: {shown(name)} cannot read packed rows: {fault}")
    pad = loaded.tokenizer.pad_token_id
    return Feed(
        rows=rows,
        num_examples=recipe.num_examples,
        batch_size=recipe.batch_size,
        pad_token_id=0 if pad is None else pad,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )


def targets_of(recipe: PrecisionRecipe, loaded: LoadedModel, trained: Trained) -> Targets:
    """Finds what is described, by the names that it has on disk.

    Raises:
        ModelError: nothing of that kind is there.
        MissingTensorError: it is stored in another layout than it has in memory.
    """
    spec: EstimatorSpec = get_estimator(recipe.estimator.name)
    dimension = recipe.estimator.options.plain().get("max_dimension")
    assert recipe.space is not None  # the recipe was checked
    found = find_targets(
        loaded.model,
        space=recipe.space,
        factors=spec.factors,
        max_dimension=dimension if isinstance(dimension, int) else None,
    )
    if recipe.space == "product":
        return found
    names = parameter_names(loaded.model, trained)
    weights = tuple(replace(weight, name=names[weight.path]) for weight in found.weights)
    layers = tuple(replace(layer, name=names[layer.name]) for layer in found.layers)
    _check_shapes(trained, {weight.name: weight.shape for weight in weights})
    return Targets(found.space, weights, layers)


def _check_shapes(trained: Trained, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        stored = trained.tensors[name].shape
        if stored != shape:
            raise MissingTensorError(
                f"{shown(trained.label)}: {shown(name)} is {stored} on disk and {shape} in memory; expected one shape"
            )
