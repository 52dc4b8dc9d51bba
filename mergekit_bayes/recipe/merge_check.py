"""From plain data to a merge recipe, with every problem of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mergekit_bayes.recipe.merge import SPECS, MergeRecipe, MethodContext
from mergekit_bayes.recipe.merge_consistency import consistency_problems
from mergekit_bayes.recipe.mergekit_words import TOP_LEVEL_KEYS
from mergekit_bayes.recipe.method_schema import MethodSchema, find_method
from mergekit_bayes.recipe.parameters import Parameters
from mergekit_bayes.recipe.problem import Problem
from mergekit_bayes.recipe.wording import Place, Wording, validate

_REQUIRED = {
    "merge_method": "name a method, such as `merge_method: linear`. `bayes-merge methods` lists them.",
    "models": "list the models to merge, each `- model: ...`.",
    "model": "every entry names a model.",
}


def check_merge(
    data: Mapping[str, object], methods: Sequence[MethodSchema]
) -> tuple[MergeRecipe | None, list[Problem]]:
    """The recipe with the method's default parameters filled in, or what is wrong with it.

    Args:
        data: the recipe as plain data.
        methods: the merge methods there are.
    """
    method = find_method(methods, data.get("merge_method"))
    wording = Wording(SPECS, _REQUIRED, _foreign(method), {"models": frozenset({"slices", "modules"})})
    recipe, problems = validate(MergeRecipe, data, wording, context=MethodContext(tuple(methods), method))
    if method is not None:
        problems += consistency_problems(data, method)
    return (_with_defaults(recipe, method) if recipe and method else None), problems


def _foreign(method: MethodSchema | None) -> Callable[[Place, str], str | None]:
    def about(place: Place, name: str) -> str | None:
        if not place and name in TOP_LEVEL_KEYS:
            return f"a key of mergekit that is not supported here: {TOP_LEVEL_KEYS[name]}."
        parameter = method.parameter(name) if method else None
        if parameter is None:
            return None
        home = "models[i].parameters" if parameter.per_source else "parameters"
        return f"unknown key. It belongs under `{home}`."

    return about


def _with_defaults(recipe: MergeRecipe, method: MethodSchema) -> MergeRecipe:
    defaults = {p.name: p.default for p in method.parameters if p.default is not None and p.only is None}
    missing = [(name, value) for name, value in defaults.items() if name not in recipe.parameters]
    parameters = Parameters((*recipe.parameters.entries, *missing))
    return recipe.model_copy(update={"parameters": parameters})
