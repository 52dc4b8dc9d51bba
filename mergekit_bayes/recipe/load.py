"""From a recipe file or a Python mapping to a checked recipe, with every problem of it in one error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe.consistency import consistency_problems
from mergekit_bayes.recipe.document import Document, read_document
from mergekit_bayes.recipe.merge import SPECS, MergeRecipe, MethodContext
from mergekit_bayes.recipe.mergekit_words import TOP_LEVEL_KEYS
from mergekit_bayes.recipe.method_schema import MethodSchema, find_method
from mergekit_bayes.recipe.override import apply_overrides
from mergekit_bayes.recipe.parameters import Parameters
from mergekit_bayes.recipe.problem import KeyPath, Problem, did_you_mean, format_path, show

KINDS_ELSEWHERE = ("finetune", "precision", "preview", "evaluate")
"""Kinds of recipe that this version does not run."""


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    methods: Sequence[MethodSchema],
    overrides: Sequence[str] = (),
) -> MergeRecipe:
    """Read and check a merge recipe; no file but the recipe itself is opened.

    Args:
        source: a path, or the recipe as a mapping.
        methods: the merge methods there are.
        overrides: `key.path=value`, written into the recipe before it is checked.

    Returns:
        The recipe with the method's default parameters filled in.

    Raises:
        RecipeError: with all problems at once, in the order of the file, each as
            `file:line:column  key.path: message`.
    """
    document = Document(source) if isinstance(source, Mapping) else read_document(source)
    document = apply_overrides(document, overrides) if overrides else document
    data, places = document.data, document.places
    if problem := _kind_problem(data):
        raise RecipeError(places.describe(problem))
    method = find_method(methods, data.get("merge_method"))
    recipe, problems = _validate(data, MethodContext(tuple(methods), method))
    if method is not None:
        problems += consistency_problems(data, method)
    if problems or recipe is None or method is None:  # a problem each time; spelled out for the type checker
        raise RecipeError(places.describe_all(problems))
    return _with_defaults(recipe, method).placed(places)


def _kind_problem(data: Mapping[str, object]) -> Problem | None:
    kind = data.get("kind", "merge")
    if kind == "merge":
        return None
    if kind in KINDS_ELSEWHERE:
        return Problem(("kind",), f"recipes of kind `{kind}` are not in this version; it runs `merge`.")
    hint = did_you_mean(kind, ("merge", *KINDS_ELSEWHERE)) if isinstance(kind, str) else ""
    return Problem(("kind",), f"expected `merge`, found {show(kind)}.{hint}")


def _validate(data: Mapping[str, object], context: MethodContext) -> tuple[MergeRecipe | None, list[Problem]]:
    try:
        return MergeRecipe.model_validate(dict(data), context=context), []
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=True)
        return None, [problem for e in errors for problem in _problems(e, context)]


def _problems(error: Any, context: MethodContext) -> Iterator[Problem]:
    """Our words for one of pydantic's errors; its own sentences name Python types and web pages."""
    path: KeyPath = tuple(error["loc"])
    match error["type"]:
        case "refusal":
            for problem in error["ctx"]["problems"]:
                yield Problem((*path, *problem.path), problem.message, problem.at_key)
        case "missing" if _stands_in(path[-1], error["input"]):
            return  # the key that was written in its place is reported
        case "missing":
            yield Problem(path, f"missing; {_REQUIRED[str(path[-1])]}")
        case "extra_forbidden":
            yield Problem(path, _unknown_key(path, context), at_key=True)
        case "invalid_key":
            yield Problem(path[:-1], f"a key is text, found {show(path[-1])}.")
        case _:
            seen = error["input"]
            hint = f" Write `- model: {show(seen)[1:-1]}`." if path[0] == "models" and isinstance(seen, str) else ""
            yield Problem(path, f"{_EXPECTED[error['type']]}, found {show(seen)}.{hint}")


def _stands_in(missing: str | int, siblings: Mapping[str, object]) -> bool:
    """Whether a key near in spelling or meaning was written instead of the missing one."""
    meant = f"`{missing}`"
    misspelt = any(meant in did_you_mean(str(key), _spec_keys(missing)) for key in siblings if key != missing)
    return misspelt or (missing == "models" and not {"slices", "modules"}.isdisjoint(siblings))


def _spec_keys(key: str | int) -> list[str]:
    return next(list(spec.model_fields) for spec in SPECS.values() if key in spec.model_fields)


_REQUIRED = {
    "merge_method": "name a method, such as `merge_method: linear`. `bayes-merge methods` lists them.",
    "models": "list the models to merge, each `- model: ...`.",
    "model": "every entry names a model.",
}

_EXPECTED = {"model_type": "expected a mapping of keys"}


def _unknown_key(path: KeyPath, context: MethodContext) -> str:
    name, place = str(path[-1]), tuple(step for step in path[:-1] if isinstance(step, str))
    if not place and name in TOP_LEVEL_KEYS:
        return f"a key of mergekit that is not supported here: {TOP_LEVEL_KEYS[name]}."
    known = [key for key in SPECS[place].model_fields if not (key == "kind" and place)]
    elsewhere = _elsewhere(name, context)
    return f"unknown key.{elsewhere or did_you_mean(name, known) or _known(known)}"


def _elsewhere(name: str, context: MethodContext) -> str:
    parameter = context.method.parameter(name) if context.method else None
    if parameter is not None:
        return f" It belongs under `{'models[i].parameters' if parameter.per_source else 'parameters'}`."
    homes = [place for place, spec in SPECS.items() if name in spec.model_fields]
    if not homes:
        return ""
    home = format_path(homes[0])
    return f" It belongs under `{home}`." if home else " It belongs at the top of the recipe."


def _known(names: Sequence[str]) -> str:
    return f" Known here: {', '.join(f'`{name}`' for name in names)}."


def _with_defaults(recipe: MergeRecipe, method: MethodSchema) -> MergeRecipe:
    defaults = {p.name: p.default for p in method.parameters if p.default is not None and p.only is None}
    missing = [(name, value) for name, value in defaults.items() if name not in recipe.parameters]
    parameters = Parameters((*recipe.parameters.entries, *missing))
    return recipe.model_copy(update={"parameters": parameters})
