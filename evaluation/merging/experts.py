"""Trained models of the study: what is on disk for one seed of one way of training, as dense tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from evaluation.merging.family import Family, encoder_of, put

JOINT = "joint"
FINAL, HALF = "final", "half"


@dataclass(frozen=True)
class Place:
    """Where the models of one family, way of training (`full` or `lora`) and seed are."""

    root: Path
    family: str
    mode: str
    seed: int

    def folder(self, task: str) -> Path:
        return self.root / self.family / self.mode / task / str(self.seed)


@dataclass(frozen=True)
class Experts:
    """The tensors that tasks share, of the base and of every expert; only those that moved, in the base's order."""

    base: dict[str, Tensor]
    final: dict[str, dict[str, Tensor]]
    half: dict[str, dict[str, Tensor]]


def load_experts(family: Family, place: Place) -> Experts:
    """Experts of all tasks of the family, at the end of training and half-way."""
    final = {task: encoder_tensors(place, task, FINAL) for task in family.tasks}
    half = {task: encoder_tensors(place, task, HALF) for task in family.tasks}
    model = next(iter(family.models(place.seed).values()))
    moved = next(iter(final.values()))
    base = {name: value.detach().clone() for name, value in encoder_of(model).items() if name in moved}
    return Experts(base, final, half)


def encoder_tensors(place: Place, task: str, when: str = FINAL) -> dict[str, Tensor]:
    """What training moved of the shared tensors."""
    found = load_file(place.folder(task) / f"{when}.safetensors")
    return {name: value for name, value in found.items() if ":" not in name}


def with_heads(family: Family, place: Place, *, joint: bool = False) -> dict[str, nn.Module]:
    """The base under every task's own trained head; for language models, which have none, just the base."""
    models = family.models(place.seed)
    for task, model in models.items():
        found = load_file(place.folder(JOINT if joint else task) / f"{FINAL}.safetensors")
        heads = {name.partition(":")[2]: value for name, value in found.items() if name.startswith(f"{task}:")}
        put(model, heads)
    return models
