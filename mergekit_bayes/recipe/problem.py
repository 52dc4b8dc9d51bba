"""What is wrong in a recipe, and where: key paths, problems, and the places they are reported at."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pydantic_core import PydanticCustomError

KeyPath: TypeAlias = tuple[str | int, ...]
"""The way to one value of a recipe: `("models", 0, "parameters", "weight")`."""


@dataclass(frozen=True, order=True)
class Location:
    """A place in a text, counted from 1 as editors do."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Args:
        path: the key it concerns; the key itself may be absent from the recipe.
        message: a sentence or two: what was seen, what was expected, what to do.
        at_key: point at the key rather than at its value (a key that should not be there).
    """

    path: KeyPath
    message: str
    at_key: bool = False


Refusal: TypeAlias = PydanticCustomError
"""Raised for a value that no recipe may have; `load_recipe` gathers all of them into one RecipeError.

pydantic's own class, because pydantic collects it from every field.
"""


def refusal(*problems: Problem | str) -> Refusal:
    """A refusal of a value; it can hold several problems at places below the value.

    Args:
        *problems: each with its path relative to the value; a plain string concerns the value itself.
    """
    found = tuple(p if isinstance(p, Problem) else Problem((), p) for p in problems)
    message = "; ".join(problem.message for problem in found)
    return PydanticCustomError("refusal", "{message}", {"message": message, "problems": found})


def problems_of(error: Refusal, *path: str | int) -> tuple[Problem, ...]:
    """The problems a refusal holds, with `path` put in front of theirs."""
    found: tuple[Problem, ...] = (error.context or {})["problems"]
    return tuple(Problem((*path, *p.path), p.message, p.at_key) for p in found)


@dataclass(frozen=True)
class Places:
    """Where every key and value of a recipe was written.

    Two `Places` are always equal: where a recipe was written does not change what it says.

    Args:
        name: the file as the user wrote it; None for a recipe given as a Python mapping.
        values: the place of each value.
        keys: the place of each key.
        overrides: the paths that `--set` replaced.
        data: the recipe as written, which says where a list of one or a section of one key was written in short.
    """

    name: str | None = field(default=None, compare=False)
    values: Mapping[KeyPath, Location] = field(default_factory=dict, compare=False)
    keys: Mapping[KeyPath, Location] = field(default_factory=dict, compare=False)
    overrides: tuple[KeyPath, ...] = field(default=(), compare=False)
    data: object = field(default=None, compare=False)

    def as_written(self, path: KeyPath) -> KeyPath:
        """The path without the steps that the recipe left out: `data.train[0].path` may be just `data.train`."""
        node, written = self.data, list[str | int]()
        for step in path:
            if isinstance(node, Mapping):
                if isinstance(step, int):
                    continue
                node = node.get(step)
            elif isinstance(node, list | tuple):
                node = node[step] if isinstance(step, int) and step < len(node) else None
            elif node is not None:
                break
            written.append(step)
        return tuple(written)

    def where(self, path: KeyPath, *, at_key: bool = False) -> str:
        """`recipe.yaml:4:12`, `--set models[0].weight`, or the key's path for a recipe without a file.

        A key that is not there is placed at the innermost mapping or list around it that is.
        """
        path = self.as_written(path)
        override = self.override_of(path)
        if override is not None:
            return f"--set {format_path(override)}"
        if self.name is None:
            return format_path(path)
        return f"{self.name}:{self.location(path, at_key=at_key)}"

    def location(self, path: KeyPath, *, at_key: bool = False) -> Location:
        """Line and column of a value (of its key with `at_key`), or of what is around it."""
        if at_key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, Location(1, 1))

    def override_of(self, path: KeyPath) -> KeyPath | None:
        """The path given to `--set` that this path lies at or below, if any; the last one wins."""
        hits = [given for given in self.overrides if path[: len(given)] == given]
        return hits[-1] if hits else None

    def describe(self, problem: Problem) -> str:
        """The line a user reads: place, two spaces, path of the key, message."""
        path = format_path(self.as_written(problem.path))
        place = self.where(problem.path, at_key=problem.at_key)
        if place in (path, f"--set {path}"):
            return f"{place}: {problem.message}" if place else problem.message
        return f"{place}  {path}: {problem.message}" if path else f"{place}  {problem.message}"

    def describe_all(self, problems: Iterable[Problem]) -> list[str]:
        """All problems in the order of the file, those of `--set` last, each once."""
        ordered = sorted(problems, key=self._order)
        return list(dict.fromkeys(self.describe(problem) for problem in ordered))

    def _order(self, problem: Problem) -> tuple[bool, Location]:
        path = self.as_written(problem.path)
        return self.override_of(path) is not None, self.location(path, at_key=problem.at_key)


def format_path(path: Sequence[str | int]) -> str:
    """`models[0].parameters.weight`; empty for the recipe as a whole."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{_printable(step)}" if text else _printable(step)
    return text


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """` Did you mean ...?` with the nearest valid name, or an empty string when none is near."""
    options = {option.lower(): option for option in valid}
    near = difflib.get_close_matches(name[:80].lower(), options, n=1, cutoff=0.6)
    return f" Did you mean `{options[near[0]]}`?" if near else ""


def one_of(options: Iterable[str], last: str = "or") -> str:
    """The options, each in backquotes, as a message lists them: `a`, `b` or `c`."""
    quoted = [f"`{option}`" for option in options]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}"


def show(value: object) -> str:
    """A value as a message quotes it: short, on one line, never the inside of a list or mapping."""
    match value:
        case None:
            shown = "nothing"
        case bool():
            shown = "true" if value else "false"
        case int() if value.bit_length() > 64:
            shown = f"an integer of {value.bit_length()} bits"
        case int() | float():
            shown = repr(value)
        case str():
            shown = f'"{_printable(value)}"'
        case Mapping():
            shown = "a mapping"
        case list() | tuple():
            shown = "a list"
        case _:
            shown = f"a Python {type(value).__name__}"
    return shown


def _printable(text: str) -> str:
    short = text if len(text) <= 60 else text[:57] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)
