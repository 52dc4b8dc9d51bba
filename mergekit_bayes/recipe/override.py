"""`--set key.path=value`: changes to a recipe from the command line, made before it is checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe.document import Document, parse_value
from mergekit_bayes.recipe.problem import KeyPath, Places, Refusal, format_path, refusal, show

_STEP = re.compile(r"([^.\[\]\s]+)((?:\[[0-9]{1,9}\])*)")


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """A document with each `key.path=value` written into it, in the order given; the value is YAML.

    Raises:
        RecipeError: an override that is not of this form, or whose path leads through a value or past the end
            of a list.
    """
    data: object = document.data
    problems: list[str] = []
    places = document.places
    for override in overrides:
        try:
            path, value = _parse(override)
            data = _assign(data, path, 0, value)
            places = replace(places, overrides=(*places.overrides, path))
        except RecipeError as error:
            problems += error.problems
        except Refusal as error:
            problems.append(f"--set {override.split('=')[0]}: {error}")
    if problems or not isinstance(data, Mapping):
        raise RecipeError(problems)
    return Document(data, _forget(places))


def parse_path(text: str) -> KeyPath:
    """The path written as `models[0].parameters.weight`.

    Raises:
        Refusal: it is not of this form.
    """
    path: list[str | int] = []
    for part in text.split("."):
        step = _STEP.fullmatch(part)
        if step is None:
            raise refusal("not a path of keys such as `models[0].parameters.weight`.")
        path.append(step[1])
        path += [int(index) for index in re.findall(r"[0-9]+", step[2])]
    return tuple(path)


def _parse(override: str) -> tuple[KeyPath, object]:
    key, equals, text = override.partition("=")
    if not equals:
        raise refusal("expected key.path=value.")
    path = parse_path(key.strip())
    return path, parse_value(text, f"--set {key.strip()}")


def _assign(data: object, path: KeyPath, depth: int, value: object) -> object:
    if depth == len(path):
        return value
    step, at = path[depth], format_path(path[:depth])
    if isinstance(step, int):
        if not isinstance(data, list | tuple):
            raise refusal(f"`{at}` is {show(data)}, not a list.")
        if step >= len(data):
            raise refusal(f"`{at}` has {len(data)} entries, numbered from 0.")
        return [*data[:step], _assign(data[step], path, depth + 1, value), *data[step + 1 :]]
    if data is not None and not isinstance(data, Mapping):
        raise refusal(f"`{at}` is {show(data)}, not a mapping.")
    entries = dict(data or {})
    entries[step] = _assign(entries.get(step), path, depth + 1, value)
    return entries


def _forget(places: Places) -> Places:
    """Without the places in the file of what was replaced."""
    return replace(
        places,
        values={path: place for path, place in places.values.items() if places.override_of(path) is None},
        keys={path: place for path, place in places.keys.items() if places.override_of(path) is None},
    )
