"""Scores of one model on the held-out data of every task: example by example, higher is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evaluation.merging.family import Batch, Family


def score(family: Family, models: Mapping[str, nn.Module], part: str) -> dict[str, list[float]]:
    """Score of every held-out example of every task under its own model.

    Returns:
        By task: for language minus the mean loss of each window, in nats per token; for classes 1 where the most likely
        one is right, else 0. The mean over examples is the task's score.
    """
    return {task: score_task(models[task], family.held_out(task, part)) for task in family.tasks}


@torch.no_grad()
def score_task(model: nn.Module, batches: Sequence[Batch]) -> list[float]:
    model.eval()
    found: list[float] = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, labels = model(**inputs).logits, batch["labels"]
        each = _hits(logits, labels) if labels.dim() == 1 else _windows(logits, labels)
        found += [round(value, 5) for value in each.tolist()]
    return found


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float()


def _windows(logits: Tensor, labels: Tensor) -> Tensor:
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return -losses.mean(1)
