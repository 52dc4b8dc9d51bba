"""What a recipe needs to know about a merge method: plain data, handed in by those who have the registry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mergekit_bayes.recipe.scalar import Scalar, ScalarType


@dataclass(frozen=True)
class ParameterSchema:
    """One name a recipe may write under `parameters`.

    Args:
        name: the key.
        type: float, int, bool or str.
        default: the value when no recipe sets it; None leaves it unset.
        minimum: the smallest number allowed.
        maximum: the largest number allowed.
        only: the one value that is supported, for parameters known so that mergekit's recipes can be read.
        per_source: it may differ between sources, and so may stand under `models[i].parameters`.
        help: one line.
    """

    name: str
    type: ScalarType
    default: Scalar | None = None
    minimum: float | None = None
    maximum: float | None = None
    only: Scalar | None = None
    per_source: bool = False
    help: str = ""


WEIGHT = ParameterSchema("weight", float, per_source=True, help="mixing coefficient of a source")
"""What every method takes for every source."""


@dataclass(frozen=True)
class MethodSchema:
    """One merge method as a recipe sees it.

    Args:
        name: what `merge_method` says.
        aliases: other names for it.
        base: whether the base's mean enters the result; where it does, a source that is the base itself needs
            no weight.
        parameters: what it takes besides `weight`.
    """

    name: str
    aliases: tuple[str, ...] = ()
    base: Literal["required", "optional", "unused"] = "required"
    parameters: tuple[ParameterSchema, ...] = ()

    def all_parameters(self) -> tuple[ParameterSchema, ...]:
        """`weight` and the method's own parameters."""
        return (WEIGHT, *self.parameters)

    def parameter(self, name: str) -> ParameterSchema | None:
        """The parameter of this name, if the method takes one."""
        return next((p for p in self.all_parameters() if p.name == name), None)


def find_method(methods: Iterable[MethodSchema], name: object) -> MethodSchema | None:
    """The method called `name`, by its name or one of its aliases."""
    return next((m for m in methods if name in (m.name, *m.aliases)), None)


def method_words(methods: Iterable[MethodSchema]) -> tuple[str, ...]:
    """Every name and alias."""
    return tuple(word for m in methods for word in (m.name, *m.aliases))
