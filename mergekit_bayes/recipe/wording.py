"""pydantic's errors in our words: its own sentences name Python types and web pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from pydantic import ValidationError

from mergekit_bayes.recipe.problem import KeyPath, Problem, did_you_mean, format_path, show
from mergekit_bayes.recipe.spec import Spec

R = TypeVar("R", bound=Spec)

Place: TypeAlias = tuple[str, ...]
"""The names on the way to a mapping of a recipe, without the positions in lists."""


@dataclass(frozen=True)
class Wording:
    """What the messages about one kind of recipe need to know.

    Args:
        specs: the spec at each place.
        required: what a missing key is for, as the end of a sentence.
        foreign: a sentence about a key that no spec has at this place, but that people write there; None for others.
        stand_ins: keys that are written in the place of a required one; near spellings count by themselves.
        tags: places whose last name is in no file: pydantic's choice between specs at the place before.
    """

    specs: Mapping[Place, type[Spec]]
    required: Mapping[str, str]
    foreign: Callable[[Place, str], str | None]
    stand_ins: Mapping[str, frozenset[str]] = field(default_factory=dict)
    tags: frozenset[Place] = frozenset()

    def homes(self, name: str) -> list[Place]:
        """Every place that has a key of this name."""
        found = [place for place, spec in self.specs.items() if name in spec.model_fields]
        return list(dict.fromkeys(place[:-1] if place in self.tags else place for place in found))


def validate(
    spec: type[R], data: Mapping[str, object], wording: Wording, *, context: object = None
) -> tuple[R | None, list[Problem]]:
    """A checked recipe, or everything that is wrong with single values of it.

    Args:
        spec: the recipe's class.
        data: plain data.
        wording: for the messages.
        context: what validators want to know besides the value.
    """
    try:
        return spec.model_validate(dict(data), context=context), []
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=True)
        return None, [problem for e in errors for problem in _problems(e, wording)]


def _problems(error: Any, wording: Wording) -> Iterator[Problem]:
    path, place = _split(tuple(error["loc"]), wording)
    match error["type"]:
        case "refusal":
            for problem in error["ctx"]["problems"]:
                yield Problem((*path, *problem.path), problem.message, problem.at_key)
        case "missing" if _stands_in(str(path[-1]), place[:-1], error["input"], wording):
            return  # the key that was written in its place is reported
        case "missing":
            yield Problem(path, f"missing; {wording.required[str(path[-1])]}")
        case "extra_forbidden":
            yield Problem(path, _unknown_key(place[:-1], str(path[-1]), wording), at_key=True)
        case "invalid_key":
            yield Problem(path[:-1], f"a key is text, found {show(path[-1])}.")
        case _:
            seen = error["input"]
            hint = _written_out(place, seen, wording) if isinstance(seen, str) else ""
            yield Problem(path, f"{_EXPECTED[error['type']]}, found {show(seen)}.{hint}")


_EXPECTED = {"model_type": "expected a mapping of keys"}


def _written_out(place: Place, text: str, wording: Wording) -> str:
    """How to write the mapping that a text stands for."""
    shown, known = show(text)[1:-1], wording.specs[place].model_fields
    if "model" in known:
        return f" Write `- model: {shown}`."
    return f" Write `{place[-1]}: {{path: {shown}}}`." if "path" in known else ""


def _split(loc: KeyPath, wording: Wording) -> tuple[KeyPath, Place]:
    """Path of the key as written, and its place as `Wording.specs` has it."""
    place = tuple(step for step in loc if isinstance(step, str))
    depth = next((len(tag) for tag in wording.tags if place[: len(tag)] == tag), 0)
    return (loc[: depth - 1] + loc[depth:] if depth else loc), place


def _stands_in(missing: str, place: Place, siblings: Mapping[str, object], wording: Wording) -> bool:
    """Whether a key near in spelling or meaning was written instead of the missing one."""
    known = wording.specs[place].model_fields
    others = [key for key in siblings if isinstance(key, str) and key not in known]
    inside = wording.specs.get((*place, missing))
    return any(
        f"`{missing}`" in did_you_mean(key, known)
        or key in wording.stand_ins.get(missing, ())
        or (inside is not None and key in inside.model_fields)
        for key in others
    )


def _unknown_key(place: Place, name: str, wording: Wording) -> str:
    known = list(wording.specs[place].model_fields)
    return wording.foreign(place, name) or (
        f"unknown key.{_elsewhere(wording.homes(name)) or did_you_mean(name, known) or _known(known)}"
    )


def _elsewhere(homes: Sequence[Place]) -> str:
    if not homes:
        return ""
    if () in homes:
        return " It belongs at the top of the recipe."
    return f" It belongs under {' or '.join(f'`{format_path(home)}`' for home in homes)}."


def _known(names: Sequence[str]) -> str:
    return f" Known here: {', '.join(f'`{name}`' for name in names)}."
