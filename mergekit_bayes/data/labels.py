"""The classes of a classifier: their names, and which one a label in the data means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mergekit_bayes.checkpoint.files import brief, listed, shown
from mergekit_bayes.data.files import Place
from mergekit_bayes.errors import DataError
from mergekit_bayes.recipe.problem import did_you_mean

_NUMBER = re.compile(r"-?[0-9]{1,18}")
_MANY = 50


@dataclass
class FoundLabels:
    """The different labels of one data set.

    Attributes:
        column: the column they are in.
        class_names: names that the data set has for the integers in it, in the order of the classes.
        places: each label, by its name, with the first row that has it.
        rows: how many labels were read.
    """

    column: str
    class_names: tuple[str, ...] = ()
    places: dict[str, Place] = field(default_factory=dict)
    rows: int = 0

    def add(self, value: object, place: Place) -> str:
        """Returns the name of a row's label, and remembers it.

        Raises:
            DataError: the row has no label, or one that is no class.
        """
        name = self._name(value, place)
        self.places.setdefault(name, place)
        self.rows += 1
        return name

    def _name(self, value: object, place: Place) -> str:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or value == "" or (value == -1 and self.class_names):
            raise DataError(f"{place}: has no label in `{self.column}`; expected one in every row")
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int) and self.class_names:
            if not 0 <= value < len(self.class_names):
                expected = f"expected 0 to {len(self.class_names) - 1} ({listed(self.class_names)})"
                raise DataError(f"{place}: the label in `{self.column}` is {value}; {expected}")
            return self.class_names[value]
        if not isinstance(value, str | int):
            kind = type(value).__name__
            seen = f"the label in `{self.column}` is {brief(value)} ({kind})"
            raise DataError(f"{place}: {seen}; expected the name or number of one class")
        return str(value)


def label_names(found: Sequence[FoundLabels]) -> tuple[str, ...]:
    """The names of the classes, from the labels of the training data.

    The order is that of the data sets' own list of classes if they agree on one; else numbers in order, or names in
    alphabetical order.

    Raises:
        DataError: there is only one, or labels are numbers in one place and names in another, or nearly every row
            has its own.
    """
    declared = {labels.class_names for labels in found}
    if len(declared) == 1 and (names := declared.pop()):
        return names
    places = {name: place for labels in reversed(found) for name, place in labels.places.items()}
    numbers = sorted((name for name in places if _is_number(name)), key=int)
    words = sorted(name for name in places if not _is_number(name))
    if numbers and words:
        examples = (f"{shown(name)} at {places[name]}" for name in (numbers[0], words[0]))
        seen = "labels are numbers and names ({}, {})".format(*examples)
        raise DataError(f"{seen}; expected one of both, or their meaning by `data.labels`")
    if len(places) < 2:
        seen = f"every row of the training data has the label {shown(next(iter(places)))}" if places else "no labels"
        raise DataError(f"{seen}; expected at least two labels, or all that there can be in `data.labels`")
    rows = sum(labels.rows for labels in found)
    if len(places) > max(_MANY, rows / 2):
        seen = f"the column `{found[0].column}` holds {len(places)} different values in {rows} rows"
        raise DataError(f"{seen}; expected the names of classes, or all of them in `data.labels`")
    return tuple(numbers or words)


def label_indices(found: FoundLabels, names: Sequence[str]) -> Mapping[str, int]:
    """Which class each label of a data set means: its name, or where it is none, its number.

    Args:
        found: the labels of the data set.
        names: the names of the classes.

    Raises:
        DataError: a label is none of them.
    """
    indices = {}
    for label, place in found.places.items():
        if label in names:
            indices[label] = names.index(label)
        elif _is_number(label) and not any(map(_is_number, names)) and 0 <= int(label) < len(names):
            indices[label] = int(label)
        else:
            expected = f"expected one of {listed(names)}.{did_you_mean(label, names)}".rstrip(".")
            raise DataError(f"{place}: the label in `{found.column}` is {shown(label)}; {expected}")
    return indices


def _is_number(name: str) -> bool:
    return _NUMBER.fullmatch(name) is not None
