"""What a recipe needs to know about a merge method: the attributes that the registry's entries have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mergekit_bayes.recipe.scalar import Scalar, ScalarType


class ParameterSchema(Protocol):
    """One name a recipe may write under `parameters`; see `mergekit_bayes.merge.parameter.Parameter`."""

    @property
    def name(self) -> str:
        """The key."""
        ...

    @property
    def type(self) -> ScalarType:
        """One of float, int, bool and str."""
        ...

    @property
    def default(self) -> Scalar | None:
        """The value when no recipe sets it; None if it must be set."""
        ...

    @property
    def minimum(self) -> float | None:
        """The smallest number allowed."""
        ...

    @property
    def maximum(self) -> float | None:
        """The largest number allowed."""
        ...

    @property
    def help(self) -> str:
        """One line."""
        ...

    @property
    def only(self) -> Scalar | None:
        """The one value that is supported, for parameters known so that mergekit's recipes can be read."""
        ...

    @property
    def per_source(self) -> bool:
        """Whether it may differ between sources, and so may stand under `models[i].parameters`."""
        ...


class MethodSchema(Protocol):
    """One merge method as a recipe sees it; see `mergekit_bayes.merge.registry.MergeMethod`."""

    @property
    def name(self) -> str:
        """What `merge_method` says."""
        ...

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names for it."""
        ...

    @property
    def base(self) -> Literal["required", "unused"]:
        """Whether the base's mean enters the result."""
        ...

    @property
    def parameters(self) -> Sequence[ParameterSchema]:
        """What it takes besides `weight`."""
        ...


@dataclass(frozen=True)
class WeightSchema:
    """`weight`, which every method takes for every source."""

    name: str = "weight"
    type: ScalarType = float
    default: Scalar | None = None
    minimum: float | None = None
    maximum: float | None = None
    help: str = "mixing coefficient of a source"
    only: Scalar | None = None
    per_source: bool = True


def parameters_of(method: MethodSchema) -> tuple[ParameterSchema, ...]:
    """`weight` and the method's own parameters."""
    return (WeightSchema(), *method.parameters)


def find_parameter(method: MethodSchema, name: str) -> ParameterSchema | None:
    """The parameter of this name, if the method takes one."""
    return next((p for p in parameters_of(method) if p.name == name), None)


def find_method(methods: Iterable[MethodSchema], name: object) -> MethodSchema | None:
    """The method called `name`, by its name or one of its aliases."""
    return next((m for m in methods if name in (m.name, *m.aliases)), None)


def method_words(methods: Iterable[MethodSchema]) -> tuple[str, ...]:
    """Every name and alias."""
    return tuple(word for m in methods for word in (m.name, *m.aliases))
