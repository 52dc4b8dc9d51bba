"""From plain data to a fine-tuning recipe, with every problem of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_bayes.recipe.finetune import SPECS, FinetuneRecipe
from mergekit_bayes.recipe.finetune_consistency import consistency_problems
from mergekit_bayes.recipe.method_schema import MethodSchema
from mergekit_bayes.recipe.optimizer import AdamWSpec
from mergekit_bayes.recipe.problem import Problem
from mergekit_bayes.recipe.trainer_words import HERE, about_word
from mergekit_bayes.recipe.wording import Place, Wording, validate

_OPTIMIZERS = {place: place[-1] for place in SPECS if place[:1] == ("optimizer",)}


def check_finetune(
    data: Mapping[str, object], methods: Sequence[MethodSchema]
) -> tuple[FinetuneRecipe | None, list[Problem]]:
    """The recipe with every default filled in, or what is wrong with it.

    Args:
        data: the recipe as plain data.
        methods: not needed; a run that merges nothing has no method.
    """
    recipe, problems = validate(FinetuneRecipe, data, _WORDING)
    problems += consistency_problems(data)
    return (_without_precision(recipe) if recipe else None), problems


def _without_precision(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """AdamW leaves no precision to write."""
    if not isinstance(recipe.optimizer, AdamWSpec):
        return recipe
    return recipe.model_copy(update={"output": recipe.output.model_copy(update={"precision": False})})


def _foreign(place: Place, name: str) -> str | None:
    if place in _OPTIMIZERS:
        owner = next((other for at, other in _OPTIMIZERS.items() if name in SPECS[at].model_fields), None)
        if owner is not None:
            return f"an option of `{owner}`; this optimizer is `{_OPTIMIZERS[place]}`."
    return about_word(place[0] if place else "", name)


def _words_for(*meanings: str) -> frozenset[str]:
    return frozenset(word for word, meaning in HERE.items() if any(f"`{m}`" in meaning for m in meanings))


_WORDING = Wording(
    SPECS,
    required={
        "model": "name the model to train: a folder or hub id.",
        "data": "say what to learn from, such as `data: {train: train.jsonl}`.",
        "path": "name a folder, a file or a hub id.",
        "train": "list what to learn from, each `- path: ...`.",
    },
    foreign=_foreign,
    stand_ins={
        "model": _words_for("model.path"),
        "path": _words_for("model.path", "data.train") | {"name", "id", "file", "files", "model"},
        "data": _words_for("data.train"),
        "train": _words_for("data.train"),
    },
    tags=frozenset(_OPTIMIZERS),
)
