"""What the study needs to know of a family of tasks: one pretrained base, and data with a loss for every task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]


class Family(Protocol):
    """Tasks that share a base.

    Batches are keyword arguments of the task's model, `labels` among them, and the model returns a loss. `tuning` is
    held-out data to choose knobs on, `test` what is reported.
    """

    name: str
    tasks: tuple[str, ...]
    loss_unit: str
    lora_layers: str

    def models(self, seed: int) -> dict[str, nn.Module]:
        """A model per task: all share one encoder, the base; heads are the task's own, started from the seed."""
        ...

    def training(self, task: str, seed: int) -> Iterator[Batch]:
        """Training batches without end, in an order that the seed decides."""
        ...

    def sample(self, task: str, rows: int) -> Batch:
        """The first rows of the training data, in a fixed order, as one batch: to estimate precisions from."""
        ...

    def training_units(self, task: str) -> int:
        """How many examples or tokens the task's training data has."""
        ...

    def held_out(self, task: str, part: str) -> Sequence[Batch]:
        """Batches of the part `tuning` or `test`, the same for every model."""
        ...


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the head of one task, which no merge touches."""
    return name.split(".", maxsplit=1)[0] == "classifier"


def encoder_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that tasks share, by name, in order; a weight tied to another is there once."""
    return {name: value for name, value in model.named_parameters() if not is_head(name)}


@torch.no_grad()
def put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of these names."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameters[name].copy_(value)
