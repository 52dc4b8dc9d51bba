"""What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["Change", "Effect", "recipe_changes"]


class Effect(Enum):
    """What a changed key means for a run that has already begun."""

    NONE = "none"
    """It changes what is shown, kept or how fast it goes, not one bit of the weights."""

    LENGTH = "length"
    """The run becomes longer or shorter; what was trained stays what it was."""

    COURSE = "course"
    """From here on the run takes another course; the state still fits."""

    STATE = "state"
    """The state is one of another model, optimizer or data set."""


_EFFECTS: tuple[tuple[str, Effect], ...] = (
    ("output", Effect.NONE),
    ("training.logging_steps", Effect.NONE),
    ("training.save_steps", Effect.NONE),
    ("training.save_total_limit", Effect.NONE),
    ("training.eval_steps", Effect.NONE),
    ("training.per_device_eval_batch_size", Effect.NONE),
    ("training.report_to", Effect.NONE),
    ("training.dataloader_num_workers", Effect.NONE),
    ("training.resume_from_checkpoint", Effect.NONE),
    ("data.eval", Effect.NONE),
    ("training.num_train_epochs", Effect.LENGTH),
    ("training.max_steps", Effect.LENGTH),
    ("training.per_device_train_batch_size", Effect.COURSE),
    ("training.gradient_accumulation_steps", Effect.COURSE),
    ("training", Effect.COURSE),
    ("optimizer.lr", Effect.COURSE),
    ("optimizer.beta1", Effect.COURSE),
    ("optimizer.beta2", Effect.COURSE),
    ("optimizer.weight_decay", Effect.COURSE),
    ("optimizer.clip_radius", Effect.COURSE),
    ("", Effect.STATE),
)
"""The first entry whose key is the changed one, or stands above it, says what the change means."""


@dataclass(frozen=True)
class Change:
    """One key that differs.

    Attributes:
        key: its path, such as `optimizer.lr`.
        old: value in the checkpoint; None if it was not there.
        new: value now.
        effect: what that means.
    """

    key: str
    old: object
    new: object
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key}: was {_shown(self.old)}, now {_shown(self.new)}"


def recipe_changes(old: Mapping[str, object], new: Mapping[str, object]) -> list[Change]:
    """Returns every key in which two resolved recipes differ, in the order of their names."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        Change(key, before.get(key), after.get(key), _effect(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _leaves(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _leaves(value, key)
        else:
            yield key, value


def _effect(key: str) -> Effect:
    return next(effect for place, effect in _EFFECTS if not place or key == place or key.startswith(f"{place}."))


def _shown(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
