"""References to models: `folder_or_hub_id[@revision][+adapter[@revision]]`, or mergekit's long form."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import Problem, Refusal, did_you_mean, problems_of, refusal, show


def model_reference(value: object) -> str:
    """The short form of a reference, itself or written out as a mapping.

        {model: org/base, lora: org/adapter}                            -> org/base+org/adapter
        {model: {path: org/base, revision: v2}}                         -> org/base@v2

    Raises:
        Refusal: the mapping has other keys, or a part of it cannot be written in the short form.
    """
    if not isinstance(value, Mapping):
        return field.text(value)
    problems = _unknown_keys(value, ("model", "lora"))
    if "model" not in value and not any(did_you_mean(str(key), ("model", "lora")) for key in value):
        problems.append(Problem(("model",), "missing; a reference names a model."))
    parts: list[str] = []
    for key in ("model", "lora"):
        if value.get(key) is None and (key == "lora" or key not in value):
            continue
        try:
            parts.append(_path_with_revision(value[key], alone=len(value) == 1))
        except Refusal as error:
            problems += problems_of(error, key)
    if problems:
        raise refusal(*problems)
    return "+".join(parts)


def _path_with_revision(value: object, *, alone: bool) -> str:
    if not isinstance(value, Mapping):
        path = field.text(value)
        return path if alone else _without("+", path)
    problems = _unknown_keys(value, ("path", "revision"))
    parts: list[str] = []
    for key in ("path", "revision"):
        if value.get(key) is None and key == "revision":
            continue
        try:
            parts.append(_without("+@", field.text(value.get(key))))
        except Refusal as error:
            problems += problems_of(error, key)
    if problems:
        raise refusal(*problems)
    return "@".join(parts)


def _without(characters: str, text: str) -> str:
    for character in characters:
        if character in text:
            raise refusal(f"{show(text)} contains `{character}`, which separates the parts of a reference.")
    return text


def _unknown_keys(value: Mapping[object, object], known: tuple[str, ...]) -> list[Problem]:
    problems: list[Problem] = []
    for key in value:
        if key == "override_architecture":
            message = "not supported; tensors are matched by name, whatever the architecture. Remove it."
            problems.append(Problem((key,), message, at_key=True))
        elif key not in known:
            problems.append(Problem((str(key),), f"unknown key.{did_you_mean(str(key), known)}", at_key=True))
    return problems
