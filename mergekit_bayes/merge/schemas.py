"""The registered methods in the form in which a recipe is checked against them."""

from __future__ import annotations

from typing import Literal

from mergekit_bayes.merge.registry import MergeMethod, methods
from mergekit_bayes.recipe import MethodSchema, ParameterSchema


def method_schemas() -> tuple[MethodSchema, ...]:
    """What recipes may say about each registered method, sorted by name."""
    return tuple(_schema(method) for method in methods())


def _schema(method: MergeMethod) -> MethodSchema:
    parameters = tuple(
        ParameterSchema(
            name=parameter.name,
            type=parameter.type,
            default=parameter.default,
            minimum=parameter.minimum,
            maximum=parameter.maximum,
            only=parameter.only,
            per_source=parameter.per_source,
            help=parameter.help,
        )
        for parameter in method.parameters
    )
    # An adapter merge needs no base weights, so the plan decides whether a required base may be left out.
    base: Literal["optional", "unused"] = "optional" if method.base == "required" else "unused"
    return MethodSchema(method.name, method.aliases, base, parameters)
