"""Precision from the state of an optimizer: nothing is computed but what Adam averaged while it trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.estimate.finish import Finished, finish
from mergekit_bayes.estimate.optimizer_state import read_adam_state
from mergekit_bayes.estimate.request import Request
from mergekit_bayes.estimate.setup import load_model
from mergekit_bayes.estimate.sidecar import describe_precision, write_group
from mergekit_bayes.model.trained import parameter_names
from mergekit_bayes.precision.adam import adam_curvature

__all__ = ["estimate_from_state"]

_FILE = "group-0.safetensors"


def estimate_from_state(request: Request) -> Mapping[str, Any]:
    """Turns what Adam averaged into the precision of what it trained.

    Returns:
        The content of the report; empty in every process but the leading one.

    Raises:
        CheckpointError: the state cannot be read, or is of another model.
        NumericalError: it holds numbers that no average of squares has.
    """
    recipe, trained = request.recipe, request.trained
    assert recipe.optimizer_state is not None  # the recipe was checked
    assert recipe.training_units is not None
    if not request.leads:
        return {}
    loaded = load_model(recipe, trained, labels=trained.labels, accelerator=request.accelerator)
    names = parameter_names(loaded.model, trained)
    state = read_adam_state(_found(recipe.optimizer_state, request.recipe_dir), loaded.model, names)
    units = recipe.training_units
    curvature = adam_curvature(
        {names[name]: average for name, average in state.averages.items()},
        step=state.step,
        beta2=state.beta2,
        batch_size=recipe.batch_size,
        units=units,
    )
    known = {
        "family": "diagonal",
        "estimator": "adam",
        "space": recipe.space,
        "loss_unit": "token" if recipe.model.task == "causal_lm" else "example",
        "beta2": state.beta2,
        "steps": state.step,
        "batch_size": recipe.batch_size,
    }
    metadata = describe_precision(trained, known, num_examples=units, weight_decay=recipe.prior.weight_decay)
    folder = request.working_folder(None)
    with request.entered(folder):
        dtype = getattr(torch, recipe.output.precision)
        write_group(folder.staging / _FILE, curvature, metadata, units=units, dtype=dtype)
        return finish(request, folder, Finished(metadata, [_FILE], None, None, {}, [_NOTE]))


_NOTE = (
    "Adam squares gradients of batches: where their mean is not small beside their spread the curvature is too large, "
    "and clipped gradients make it too small"
)


def _found(path: str, recipe_dir: Path | None) -> Path:
    for folder in (Path(), *([recipe_dir] if recipe_dir is not None else [])):
        if (folder / path).exists():
            return folder / path
    raise CheckpointError(f"optimizer_state: {shown(path)} is not there; expected the file or folder of a checkpoint")
