"""Real multi-task training: one adapter for a group of tasks, batches mixed by the weights; what exists stays.

    python -m evaluation.fronts.train MODELS [--groups 0 1] [--seeds 0 1 2]

with MODELS as `evaluation.merging.train` wrote it. Writes MODELS/fronts/GROUP/WEIGHTS/SEED/final.safetensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from evaluation.fronts.design import GROUPS, MODE, SEEDS, Group, Weights, label
from evaluation.merging.family import Batch, Family
from evaluation.merging.train import SCHEDULES, Schedule, family_named, train

TASK = "mixed"


@dataclass(frozen=True)
class Mixed:
    """A family with one task whose batches are those of several tasks, in the proportion of the weights.

    Only for families without heads, where all tasks share the whole model.
    """

    family: Family
    group: Group
    weights: Weights
    name: str = "fronts"
    tasks: tuple[str, ...] = (TASK,)

    @property
    def lora_layers(self) -> str:
        return self.family.lora_layers

    def models(self, seed: int) -> dict[str, nn.Module]:
        return {TASK: self.family.models(seed)[self.group.tasks[0]]}

    def training(self, task: str, seed: int) -> Iterator[Batch]:
        """Batches in turns, each of the task that is farthest behind its share."""
        streams = [self.family.training(each, seed) for each in self.group.tasks]
        for index in turns(self.weights):
            yield next(streams[index])


def turns(weights: Sequence[float]) -> Iterator[int]:
    """Whose turn it is: after n steps a task with weight w had w n turns, up to one."""
    had = [0] * len(weights)
    while True:
        due = [weight * (sum(had) + 1) - count for weight, count in zip(weights, had, strict=True)]
        index = due.index(max(due))
        had[index] += 1
        yield index


def run_folder(root: Path, group: Group, weights: Weights, seed: int) -> Path:
    return root / "fronts" / group.name / label(weights) / str(seed)


def train_runs(family: Family, root: Path, group: Group, seed: int, schedule: Schedule) -> None:
    """Train one seed at every weight, for as many steps as the experts of the group took together."""
    longer = replace(schedule, steps=schedule.steps * len(group.tasks))
    for weights in group.weights:
        folder = run_folder(root, group, weights, seed)
        if not (folder / "run.json").exists():
            mixed = Mixed(family, group, weights)
            train(mixed, MODE, TASK, seed=seed, schedule=longer, folder=folder)  # type: ignore[arg-type]


def main() -> None:
    """Train everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--groups", nargs="+", type=int, default=list(range(len(GROUPS))))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args()
    family = family_named("language")
    for group in (GROUPS[index] for index in options.groups):
        for seed in options.seeds:
            train_runs(family, options.models, group, seed, SCHEDULES["language", MODE])


if __name__ == "__main__":
    main()
