"""What every part of a recipe is: frozen, checked data that knows what it does not know, and writes itself back.

Spec      one mapping of a recipe; each field one key, unknown keys are refused
Recipe    a whole recipe, which also knows where it was written
Entries   an immutable mapping inside a spec
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, PrivateAttr

from mergekit_bayes.recipe.problem import KeyPath, Places, Problem

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class Entries(Mapping[str, V], Generic[V]):
    """An immutable mapping from names to values, in the order of the recipe."""

    entries: tuple[tuple[str, V], ...] = ()

    def __getitem__(self, name: str) -> V:
        for key, value in self.entries:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def plain(self) -> dict[str, object]:
        """The plain data it was read from."""
        return {name: _plain(value) for name, value in self.entries}


class Spec(BaseModel):
    """One mapping of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def without_effect(self) -> frozenset[str]:
        """The keys that mean nothing beside the others; a recipe that sets one is refused, so they have defaults."""
        return frozenset()

    def plain(self) -> dict[str, object]:
        """Plain data with every default that has an effect; it reads back to an equal spec."""
        silent = self.without_effect()
        entries: dict[str, object] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            empty = value is None or (isinstance(value, Mapping | tuple) and not value)
            if name not in silent and not (empty and value == info.get_default(call_default_factory=True)):
                entries[name] = _plain(value)
        return entries


class Recipe(Spec):
    """Everything a job was asked for. Made by `load_recipe`."""

    _places: Places = PrivateAttr(default_factory=Places)

    @property
    def folder(self) -> Path | None:
        """The folder of the file this was read from, as the user wrote it; None for a recipe that is no file."""
        return None if self._places.name is None else Path(self._places.name).parent

    def where(self, path: KeyPath = ()) -> str:
        """`recipe.yaml:4:12`, the place of a value; its key path where the recipe is no file."""
        return self._places.where(path)

    def describe(self, path: KeyPath, message: str) -> str:
        """A problem with one value, as the errors of `load_recipe` are written: place, key and message."""
        return self._places.describe(Problem(path, message))

    def placed(self, places: Places) -> Self:
        """The same recipe, knowing where it was written."""
        copy = self.model_copy()
        copy._places = places
        return copy

    def resolved(self) -> dict[str, object]:
        """Plain data with every default filled in; `load_recipe` reads it back to an equal recipe."""
        return self.plain()


def checked(check: Callable[[Any], object]) -> PlainValidator:
    """A field whose value is what `check` makes of the plain data, or refuses."""
    return PlainValidator(check)


def empty_if_nothing(value: object) -> object:
    """A section that was written without content."""
    return {} if value is None else value


def _plain(value: object) -> object:
    match value:
        case Spec() | Entries():
            return value.plain()
        case tuple():
            return [_plain(entry) for entry in value]
        case _:
            return value
