"""What the study compares: groups of tasks, the weights of every group, and the families of posteriors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.merging.methods import METHODS, Method

Weights = tuple[float, ...]
MODE = "lora"
SEEDS = (0, 1, 2)
QUARTERS: tuple[Weights, ...] = ((0.75, 0.25), (0.5, 0.5), (0.25, 0.75))
_THIRD, _SIXTH = 1 / 3, 1 / 6
CENTROIDS: tuple[Weights, ...] = (
    (_THIRD, _THIRD, _THIRD),
    (2 * _THIRD, _SIXTH, _SIXTH),
    (_SIXTH, 2 * _THIRD, _SIXTH),
    (_SIXTH, _SIXTH, 2 * _THIRD),
    (0.5, 0.5, 0.0),
    (0.5, 0.0, 0.5),
    (0.0, 0.5, 0.5),
)
"""The augmented simplex-centroid design of three tasks, less its corners, which are the experts."""
WINDOWS = 24
"""Of the test data of every task: the first of those that the merging study scores."""


@dataclass(frozen=True)
class Group:
    """Tasks that are traded against each other, and the weights that are merged and trained.

    At weights of one and zeros every merge is an expert; only the others are listed.
    """

    tasks: tuple[str, ...]
    weights: tuple[Weights, ...]

    @property
    def name(self) -> str:
        return "+".join(self.tasks)


GROUPS = (
    Group(("readmes", "fonts"), QUARTERS),
    Group(("headers", "unicode"), QUARTERS),
    Group(("readmes", "headers", "unicode"), CENTROIDS),
)


@dataclass(frozen=True)
class Rule:
    """A method of the merging study with its chosen knob."""

    method: Method
    knob: float = 0.0


def rules(knobs: Mapping[str, Mapping[str, object]]) -> dict[str, Rule]:
    """The families, poorest posterior first, with the knobs that the merging study chose for its five tasks."""
    names = ("linear", "hessian_weighted", "gram", "kronecker")
    return {name: Rule(METHODS[name], float(str(knobs[name]["chosen"]))) for name in names}


def label(weights: Weights) -> str:
    """Weights in percent, as they name files and results."""
    return "-".join(f"{100 * weight:.0f}" for weight in weights)
