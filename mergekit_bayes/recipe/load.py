"""From a recipe file or a Python mapping to a checked recipe, with every problem of it in one error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar, overload

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe.document import Document, read_document
from mergekit_bayes.recipe.evaluate import EvaluateRecipe
from mergekit_bayes.recipe.evaluate_check import check_evaluate
from mergekit_bayes.recipe.finetune import FinetuneRecipe
from mergekit_bayes.recipe.finetune_check import check_finetune
from mergekit_bayes.recipe.merge import MergeRecipe
from mergekit_bayes.recipe.merge_check import check_merge
from mergekit_bayes.recipe.method_schema import MethodSchema
from mergekit_bayes.recipe.override import apply_overrides
from mergekit_bayes.recipe.precision import PrecisionRecipe
from mergekit_bayes.recipe.precision_check import check_precision
from mergekit_bayes.recipe.preview import PreviewRecipe
from mergekit_bayes.recipe.preview_check import check_preview
from mergekit_bayes.recipe.problem import Problem, did_you_mean, one_of, show
from mergekit_bayes.recipe.spec import Recipe

AnyRecipe: TypeAlias = MergeRecipe | FinetuneRecipe | PrecisionRecipe | PreviewRecipe | EvaluateRecipe
R = TypeVar("R", bound=Recipe)

_Check: TypeAlias = Callable[[Mapping[str, object], Sequence[MethodSchema]], tuple[AnyRecipe | None, list[Problem]]]

KINDS: Mapping[str, _Check] = {
    "merge": check_merge,
    "finetune": check_finetune,
    "precision": check_precision,
    "preview": check_preview,
    "evaluate": check_evaluate,
}
"""What makes a checked recipe of each kind, or says all that is wrong with it. A new kind is one entry."""


@overload
def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    methods: Sequence[MethodSchema] = ...,
    overrides: Sequence[str] = ...,
) -> AnyRecipe: ...


@overload
def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    expect: type[R],
    methods: Sequence[MethodSchema] = ...,
    overrides: Sequence[str] = ...,
) -> R: ...


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    expect: type[Recipe] = Recipe,
    methods: Sequence[MethodSchema] = (),
    overrides: Sequence[str] = (),
) -> Recipe:
    """Read and check a recipe; no file but the recipe itself is opened.

    Args:
        source: a path, or the recipe as a mapping.
        expect: the recipe's class, for callers that take recipes of one kind only.
        methods: the merge methods there are; recipes of other kinds have no use for them.
        overrides: `key.path=value`, written into the recipe before it is checked.

    Returns:
        The recipe with every default filled in; of the class that belongs to its `kind`.

    Raises:
        RecipeError: with all problems at once, in the order of the file, each as
            `file:line:column  key.path: message`.
    """
    document = Document(source) if isinstance(source, Mapping) else read_document(source)
    document = apply_overrides(document, overrides) if overrides else document
    data, places = document.data, replace(document.places, data=document.data)
    if problem := _kind_problem(data, expect):
        raise RecipeError(places.describe(problem))
    recipe, problems = KINDS[str(data.get("kind", "merge"))](data, methods)
    if problems or recipe is None:
        raise RecipeError(places.describe_all(problems))
    return recipe.placed(places)


def _kind_problem(data: Mapping[str, object], expect: type[Recipe]) -> Problem | None:
    kind = data.get("kind", "merge")
    path = ("kind",)
    if "kind" not in data and (likely := _likely_kind(data)):
        return Problem(path, f"missing; this looks like a recipe {_PURPOSES[likely]}. Write `kind: {likely}`.")
    if isinstance(kind, str) and kind in KINDS:
        wanted = kind if expect is Recipe else expect.model_fields["kind"].default
        return None if kind == wanted else Problem(path, f"expected a recipe of kind `{wanted}`, found `{kind}`.")
    hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
    return Problem(path, f"expected {one_of(KINDS)}, found {show(kind)}.{hint}")


_PURPOSES = {"finetune": "to fine-tune", "precision": "to estimate precisions", "evaluate": "to evaluate models"}


def _likely_kind(data: Mapping[str, object]) -> str | None:
    """The kind of a recipe that has the sections of one and none of a merge's."""
    if "models" in data and {"data", "lm_eval"} & data.keys() and "merge_method" not in data:
        return "evaluate"
    if {"merge_method", "models", "slices", "modules"} & data.keys():
        return None
    if "estimator" in data:
        return "precision"
    return "finetune" if {"data", "training", "adapter", "optimizer"} & data.keys() else None
