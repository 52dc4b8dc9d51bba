"""Multiple-choice questions as data sets write them: which choices a question has, and which of them is right."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_bayes.checkpoint.files import brief, listed
from mergekit_bayes.data.files import Place
from mergekit_bayes.errors import DataError

__all__ = ["Choices", "choices_in", "right_choice"]

_LETTER = re.compile(r"[A-Z]")
_NUMBER = re.compile(r"[0-9]{1,4}")
_A = ord("A")


@dataclass(frozen=True)
class Choices:
    """The choices of a question.

    Attributes:
        texts: what can follow the question, two or more, none of them blank.
        labels: what the data set calls them, such as `A` and `B`; empty where it does not.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()


def choices_in(value: object, place: Place, column: str) -> Choices | None:
    """The choices in a column; None if there is none, or one of them is blank.

    Args:
        value: a list of texts, or a mapping of the lists `text` and `label`.
        place: of the row, for messages.
        column: its name, for messages.

    Raises:
        DataError: it is something else, or a single choice.
    """
    texts: object = value
    labels: object = ()
    if isinstance(value, Mapping):
        texts, labels = value.get("text"), value.get("label", ())
    if texts is None:
        return None
    found, names = _texts(texts, value, place, column), _labels(labels, place, column)
    if names and len(names) != len(found):
        seen = f"{len(found)} texts and {len(names)} labels"
        raise DataError(f"{place}: `{column}` has {seen}; expected a label for each, or none")
    if not found or not all(text.strip() for text in found):
        return None
    if len(found) == 1:
        raise DataError(f"{place}: `{column}` has one choice; expected two or more")
    return Choices(found, names)


def right_choice(value: object, choices: Choices, place: Place, column: str) -> int:
    """The index of the right choice, in whichever way it is named; where two ways differ, neither is guessed.

    Args:
        value: its index from 0, its letter (A is the first) or its text; where choices have labels, a label or a text.
        choices: of the question.
        place: of the row, for messages.
        column: its name, for messages.

    Raises:
        DataError: there is none, it names no choice, or several.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or value in ("", -1, "-1"):
        raise DataError(f"{place}: has no answer in `{column}`; expected one in every row")
    seen = f"{place}: the answer in `{column}` is {brief(value)}"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{seen} ({type(value).__name__}); expected {_expected(choices)}")
    found = sorted(set(_readings(value, choices)))
    if not found:
        raise DataError(f"{seen}, which is none of the {len(choices.texts)} choices; expected {_expected(choices)}")
    if len(found) > 1:
        ways = " or ".join(f"choice {index} ({brief(choices.texts[index])})" for index in found)
        raise DataError(f"{seen}, which may be {ways}, counted from 0; expected the index of one, as a number")
    return found[0]


def _readings(value: int | str, choices: Choices) -> list[int]:
    """Every choice that an answer may mean."""
    if choices.labels:
        named = [index for index, label in enumerate(choices.labels) if label == str(value)]
        return named or [index for index, text in enumerate(choices.texts) if text == value]
    if isinstance(value, int):
        return [value] if 0 <= value < len(choices.texts) else []
    found = [index for index, text in enumerate(choices.texts) if text.strip() == value.strip()]
    if _LETTER.fullmatch(value):
        found.append(ord(value) - _A)
    if _NUMBER.fullmatch(value):
        found.append(int(value))
    return [index for index in found if index < len(choices.texts)]


def _expected(choices: Choices) -> str:
    if choices.labels:
        return f"one of the labels {listed(choices.labels)}, or the text of a choice"
    last = len(choices.texts) - 1
    letters = f", a letter from A to {chr(_A + last)}" if last < 26 else ""
    return f"an index from 0 to {last}{letters}, or the text of a choice"


def _texts(value: object, whole: object, place: Place, column: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        expected = "expected a list of texts, or a mapping {text: [...], label: [...]}"
        raise DataError(f"{place}: `{column}` is {brief(whole)} ({type(whole).__name__}); {expected}")
    for index, text in enumerate(value):
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"{place}: choice {index} of `{column}` is {brief(text)} ({kind}); expected text")
    return tuple(text or "" for text in value)


def _labels(value: object, place: Place, column: str) -> tuple[str, ...]:
    names = () if value is None else value
    if not isinstance(names, Sequence) or isinstance(names, str | bytes):
        raise DataError(f"{place}: the labels in `{column}` are {brief(value)}; expected a list of them")
    labels = tuple(map(str, names))
    if len(set(labels)) < len(labels):
        raise DataError(f"{place}: the labels in `{column}` are {listed(labels)}; expected different ones")
    return labels
