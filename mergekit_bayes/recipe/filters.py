"""Filters that decide for no tensor, found when a plan knows the tensors' names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mergekit_bayes.recipe.merge import MergeRecipe
from mergekit_bayes.recipe.parameters import Parameters
from mergekit_bayes.recipe.problem import KeyPath
from mergekit_bayes.recipe.value import explain_unused


def unused_filter_problems(recipe: MergeRecipe, names: Iterable[str]) -> list[str]:
    """Every filter of a recipe that decides for no tensor, each as a line like those of `load_recipe`.

    Args:
        recipe: the recipe.
        names: the tensors that are merged.
    """
    tensor_names = tuple(names)
    return [
        recipe.describe((*path, name, index, "filter"), why)
        for path, parameters in _scopes(recipe)
        for name, value in parameters.items()
        for index, why in explain_unused(value, tensor_names)
    ]


def _scopes(recipe: MergeRecipe) -> Iterator[tuple[KeyPath, Parameters]]:
    for index, source in enumerate(recipe.models):
        yield ("models", index, "parameters"), source.parameters
    yield ("parameters",), recipe.parameters
