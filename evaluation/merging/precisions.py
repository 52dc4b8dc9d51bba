"""Curvatures of the experts, by the estimators of the library, per unit of each task's loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evaluation.merging.experts import FINAL, Place, encoder_tensors, with_heads
from evaluation.merging.family import Batch, Family, put
from mergekit_bayes.precision.registry import create, get_estimator
from mergekit_bayes.precision.targets import find_targets

ESTIMATORS: Mapping[str, Mapping[str, object]] = {"fisher": {}, "gram": {}, "kfac": {}, "ekfac": {"eigenvalues": True}}
ROWS = {"language": 32, "packages": 96}
_AT_ONCE = 32


def curvature(family: Family, place: Place, task: str, estimator: str, *, when: str = FINAL) -> dict[str, Tensor]:
    """The curvature of one expert's mean loss, estimated once and then read from its folder.

    By the names of a sidecar, of everything that training moved; `gram` knows linear layers only. `estimator` is a key
    of `ESTIMATORS`, `when` says which checkpoint of the training.
    """
    path = place.folder(task) / f"{estimator}-{when}.safetensors"
    if not path.exists():
        tensors = encoder_tensors(place, task, when)
        model = with_heads(family, place)[task]
        put(model, tensors)
        _save(path, estimate(model, list(tensors), family.sample(task, ROWS.get(family.name, 16)), estimator))
    return load_file(path)


def estimate(model: nn.Module, names: list[str], rows: Batch, estimator: str) -> dict[str, Tensor]:
    """One pass of an estimator (two for `ekfac`) over some rows, divided by their units."""
    name = "kfac" if estimator == "ekfac" else estimator
    targets = find_targets(model.eval(), space="full", factors=get_estimator(name).factors, names=set(names))
    made = create(name, model, targets, seed=0, options=ESTIMATORS[estimator])
    batches = _batches(rows)
    counts = None
    for index in range(made.passes):
        made.start_pass(index)
        seen = [made.update(batch) for batch in batches]
        counts = sum(seen[1:], start=seen[0])
    assert counts is not None
    return per_unit(made.result(counts), counts.units)


def per_unit(tensors: Mapping[str, Tensor], units: int) -> dict[str, Tensor]:
    """Divide a curvature by a number of units: a diagonal, or the one factor of a layer that carries them."""
    found = {}
    for name, value in tensors.items():
        layer = name.rpartition(".")[0]
        carries = not name.endswith((".input_factor", ".output_factor"))
        if name.endswith(".output_factor"):
            carries = f"{layer}.eigenvalues" not in tensors
        if name.endswith(".input_factor"):
            carries = f"{layer}.output_factor" not in tensors
        found[name] = value / units if carries else value
    return found


def _batches(rows: Batch) -> list[Batch]:
    count = len(rows["labels"])
    numbered = {**rows, "row": torch.arange(count)}
    return [
        {name: value[start : start + _AT_ONCE] for name, value in numbered.items()}
        for start in range(0, count, _AT_ONCE)
    ]


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    unfinished = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished)
    unfinished.rename(path)
