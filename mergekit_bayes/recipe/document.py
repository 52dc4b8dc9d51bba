"""From a file to plain data, with the line and column of every key and value.

YAML 1.2, read event by event into dictionaries and lists with a stack of our own: a document nested ten
thousand deep costs as much as its first `MAX_DEPTH` brackets, and nothing is ever constructed that a recipe
may not hold (aliases, anchors, tags, merge keys, dates, second documents).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe.problem import KeyPath, Location, Places, Refusal, format_path
from mergekit_bayes.recipe.scalar import resolve_scalar

MAX_BYTES = 256 * 1024
"""Larger files are refused unread: the longest recipe one can write by hand is a tenth of this."""

MAX_DEPTH = 64
"""Deeper documents are refused at the bracket that goes too far; the grammar itself needs seven."""

_NO_ALIASES = "recipes have no anchors and aliases; write the value out."

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Document:
    """Plain data (mappings, lists, text, numbers, booleans, None) and where it was written.

    Args:
        data: the mapping at the top.
        places: line and column of every key and value.
    """

    data: Mapping[str, object]
    places: Places = field(default_factory=Places)

    @property
    def locations(self) -> Mapping[KeyPath, Location]:
        """The place of each value, by the path of its key."""
        return self.places.values


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read one YAML file.

    Raises:
        RecipeError: the file cannot be read, is larger than `MAX_BYTES`, is not UTF-8, or is not one plain
            YAML mapping; with file, line and column.
    """
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RecipeError(f"{name}: cannot read the recipe: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{name}: larger than {MAX_BYTES // 1024} KiB; a recipe is a page of text.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", errors="replace")
        seen = f"byte 0x{raw[error.start]:02x}"
        raise RecipeError(f"{name}:{_end_of(before)}  {seen} is not UTF-8 text. Save it as UTF-8.") from error
    return parse_document(text, name)


def parse_document(text: str, name: str) -> Document:
    """Read YAML from a string.

    Args:
        text: the document.
        name: what to call it in messages.

    Raises:
        RecipeError: as `read_document`.
    """
    data, builder = _build(text, name)
    if not isinstance(data, dict):
        place = builder.values.get((), Location(1, 1))
        what = "empty" if data is None else "a list" if isinstance(data, list) else "a single value"
        raise RecipeError(
            f"{name}:{place}  the recipe is {what}; it should be a mapping such as `merge_method: linear`."
        )
    return Document(data, Places(name, builder.values, builder.keys))


def parse_value(text: str, name: str) -> object:
    """Read one YAML value of any kind, as `--set` takes it after the equals sign.

    Raises:
        RecipeError: as `read_document`.
    """
    return _build(text, name)[0]


def _build(text: str, name: str) -> tuple[object, _Builder]:
    if found := _UNPRINTABLE.search(text):
        place = _end_of(text[: found.start()])
        raise RecipeError(f"{name}:{place}  character U+{ord(found[0]):04X} has no place in a text file.")
    builder = _Builder()
    try:
        for event in _events(text):
            builder.take(event)
    except _StopError as stop:
        builder.problems.append((stop.location, stop.message))
    except YAMLError as error:
        builder.problems.append(_syntax(error))
    if builder.problems:
        raise RecipeError([f"{name}:{place}  {message}" for place, message in sorted(builder.problems)])
    return builder.root, builder


def _events(text: str) -> Iterator[Event]:
    return iter(YAML(typ="safe", pure=True).parse(text))


class _StopError(Exception):
    def __init__(self, location: Location, message: str) -> None:
        self.location, self.message = location, message


@dataclass
class _Open:
    """A mapping or list whose end has not been read; `key` waits for its value."""

    path: KeyPath
    container: dict[str, object] | list[object]
    key: str | None = None


class _Builder:
    """Collects events into plain data; faults that do not stop the reading are gathered."""

    def __init__(self) -> None:
        self.root: object = None
        self.values: dict[KeyPath, Location] = {}
        self.keys: dict[KeyPath, Location] = {}
        self.problems: list[tuple[Location, str]] = []
        self._open: list[_Open] = []
        self._documents = 0

    def take(self, event: Event) -> None:
        """Add one event of the stream."""
        match event:
            case DocumentStartEvent():
                self._start_document(event)
            case AliasEvent():
                self._refuse(event, f"alias `*{event.anchor}`: {_NO_ALIASES}")
                self._place(None, _start(event))
            case ScalarEvent():
                self._refuse_properties(event)
                self._place_scalar(event)
            case CollectionStartEvent():
                self._refuse_properties(event)
                self._start_collection(event)
            case MappingEndEvent() | SequenceEndEvent():
                self._open.pop()

    def _start_document(self, event: Any) -> None:
        self._documents += 1
        if self._documents > 1:
            raise _StopError(_start(event), "a second document starts here; a recipe file holds one.")
        if event.version is not None and tuple(event.version) != (1, 2):
            raise _StopError(_start(event), "recipes are YAML 1.2; remove the %YAML line.")

    def _start_collection(self, event: Event) -> None:
        location = _start(event)
        if len(self._open) >= MAX_DEPTH:
            raise _StopError(location, f"nested more than {MAX_DEPTH} deep.")
        if self._expects_key():
            raise _StopError(location, "a key is a plain word here, found a list or mapping.")
        container: dict[str, object] | list[object] = {} if isinstance(event, MappingStartEvent) else []
        path = self._place(container, location)
        self._open.append(_Open(path, container))

    def _place_scalar(self, event: Any) -> None:
        location = _start(event)
        if self._expects_key():
            if event.value == "<<" and event.style is None:
                self._refuse(event, f"merge key `<<`: {_NO_ALIASES}")
            self._start_key(event.value, location)
            return
        value: object = event.value
        if event.style is None:
            if not event.value and self._open:  # nothing was written: the parser's mark is on the next line
                top = self._open[-1]
                location = self.keys.get((*top.path, top.key), location) if top.key else location
            try:
                value = resolve_scalar(event.value)
            except Refusal as error:
                self.problems.append((location, str(error)))
        self._place(value, location)

    def _expects_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].container, dict) and self._open[-1].key is None

    def _start_key(self, key: str, location: Location) -> None:
        top = self._open[-1]
        path = (*top.path, key)
        if path in self.keys:
            seen = f"{format_path(path)}: the key appears twice, first in line {self.keys[path].line}."
            self.problems.append((location, seen))
        self.keys.setdefault(path, location)
        top.key = key

    def _place(self, value: object, location: Location) -> KeyPath:
        if not self._open:
            self.root = value
        path = self._put(self._open[-1], value, location) if self._open else ()
        self.values[path] = location
        return path

    def _put(self, top: _Open, value: object, location: Location) -> KeyPath:
        if isinstance(top.container, list):
            top.container.append(value)
            return (*top.path, len(top.container) - 1)
        if top.key is None:  # an alias in the place of a key
            raise _StopError(location, "a key is a plain word here, found an alias.")
        key, top.key = top.key, None
        top.container[key] = value
        return (*top.path, key)

    def _refuse_properties(self, event: Any) -> None:
        if event.anchor is not None:
            self._refuse(event, f"anchor `&{event.anchor}`: {_NO_ALIASES}")
        if event.tag is not None:
            self._refuse(event, f"tag `{event.tag}`: recipes are plain data without tags; remove it.")

    def _refuse(self, event: Event, message: str) -> None:
        self.problems.append((_start(event), message))


def _start(event: Any) -> Location:
    return Location(event.start_mark.line + 1, event.start_mark.column + 1)


def _end_of(text: str) -> Location:
    lines = text.split("\n")
    return Location(len(lines), len(lines[-1]) + 1)


def _syntax(error: YAMLError) -> tuple[Location, str]:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    location = Location(mark.line + 1, mark.column + 1) if mark else Location(1, 1)
    said = [getattr(error, "problem", None) or str(error), getattr(error, "context", None)]
    message = " ".join(" (".join(filter(None, said)).split()) + ")" * bool(said[1])
    hint = " Indent with spaces, not tabs." if "\\t" in message else ""
    return location, f"not YAML: {message}.{hint}"
