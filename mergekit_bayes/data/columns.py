"""What the rows of a data set are: its format, and which of its columns hold what.

text                text
prompt_completion   prompt, completion: texts, or lists of messages
messages            messages: a list of {role, content}
labelled            text, label, and text_pair where rows are pairs of texts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.files import brief, listed
from mergekit_bayes.data.files import Place
from mergekit_bayes.data.read import Table
from mergekit_bayes.data.rows import Task
from mergekit_bayes.errors import DataError
from mergekit_bayes.recipe.data import FORMAT_COLUMNS, Format
from mergekit_bayes.recipe.problem import did_you_mean

if TYPE_CHECKING:
    from mergekit_bayes.recipe.data import DatasetSpec

_OPTIONAL = ("text_pair",)
_FORMATS: Mapping[Task, tuple[Format, ...]] = {
    "causal_lm": ("messages", "prompt_completion", "text"),  # the one that says most goes first
    "sequence_classification": ("labelled",),
}
# what others call the columns; named in messages only, since a guess would be trained on
_CALLED: Mapping[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog"),
    "prompt": ("instruction", "question", "query", "input", "source"),
    "completion": ("output", "response", "answer", "chosen", "target"),
    "text": ("content", "sentence", "sentence1", "body", "document", "review", "premise", "markdown", "code"),
    "text_pair": ("sentence2", "hypothesis", "text_b"),
    "label": ("labels", "category", "class", "target", "sentiment", "intent", "coarse_label"),
}


@dataclass(frozen=True)
class Columns:
    """How the rows of one data set are to be read.

    Attributes:
        format: what they are.
        names: standard name -> name in the data set, for the columns of the format.
        unused: columns that are not looked at.
    """

    format: Format
    names: Mapping[str, str]
    unused: tuple[str, ...]

    def value(self, row: Mapping[str, object], standard: str) -> object:
        """The value of a column under its standard name; None where the row has none."""
        name = self.names.get(standard)
        return None if name is None else row.get(name)

    def text(self, place: Place, row: Mapping[str, object], standard: str) -> str | None:
        """The text in a column; None where there is none.

        Raises:
            DataError: the row holds something else there.
        """
        value = self.value(row, standard)
        if value is not None and not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"{place}: `{self.names[standard]}` is {brief(value)} ({kind}); expected text")
        return value


def choose_columns(table: Table, spec: DatasetSpec, task: Task) -> Columns:
    """Finds format and columns of a data set.

    Args:
        table: the opened data set.
        spec: its entry in the recipe, which may name either.
        task: what the model is trained for, which decides where both a text and a label are there.

    Raises:
        DataError: a column that is needed or named is not there, or the format does not fit the task.
    """
    absent = [name for name in spec.columns.values() if name not in table.columns]
    if absent:
        raise DataError(
            f"{table.name}: has no column `{absent[0]}`, which `columns` names{_there_are(table, absent[0])}"
        )
    names = {
        standard: spec.columns.get(standard, standard) for fields in FORMAT_COLUMNS.values() for standard in fields
    }
    names = {standard: name for standard, name in names.items() if name in table.columns}
    chosen = spec.format or _from_columns(table, names, task)
    if chosen not in _FORMATS[task]:
        fitting = " or ".join(_FORMATS[task])
        raise DataError(f"{table.name}: is read as `{chosen}`, which {task} cannot learn from; expected {fitting}")
    wanted = FORMAT_COLUMNS[chosen]
    missing = [name for name in wanted if name not in names and name not in _OPTIONAL]
    if missing:
        hint = _there_are(table, missing[0]) + _mapping_hint(table, wanted)
        raise DataError(f"{table.name}: has no column {_quoted(missing)}, which the format `{chosen}` needs{hint}")
    idle = [standard for standard in spec.columns if standard not in wanted]
    if idle:
        expected = f"its columns are {_quoted(wanted)}"
        raise DataError(
            f"{table.name}: `columns` names {_quoted(idle)}, which the format `{chosen}` has not; {expected}"
        )
    used = {standard: names[standard] for standard in wanted if standard in names}
    return Columns(chosen, used, tuple(name for name in table.columns if name not in used.values()))


def _from_columns(table: Table, names: Mapping[str, str], task: Task) -> Format:
    for candidate in _FORMATS[task]:
        if all(name in names or name in _OPTIONAL for name in FORMAT_COLUMNS[candidate]):
            return candidate
    needed = ", or ".join(
        _quoted([name for name in FORMAT_COLUMNS[candidate] if name not in _OPTIONAL]) for candidate in _FORMATS[task]
    )
    hint = next(filter(None, (_mapping_hint(table, FORMAT_COLUMNS[name]) for name in _FORMATS[task])), "")
    raise DataError(f"{table.name}: has the columns {listed(table.columns)}; expected {needed}{hint}")


def _mapping_hint(table: Table, wanted: Sequence[str]) -> str:
    found = {
        standard: next((name for name in table.columns if name.lower() in _CALLED[standard]), None)
        for standard in wanted
        if standard not in table.columns
    }
    entries = [f"{standard}: {name}" for standard, name in found.items() if name is not None]
    complete = all(name is not None or standard in _OPTIONAL for standard, name in found.items())
    return f"; name them in the recipe, as in `columns: {{{', '.join(entries)}}}`" if entries and complete else ""


def _there_are(table: Table, name: str) -> str:
    return f"; it has {listed(table.columns)}.{did_you_mean(name, table.columns)}".rstrip(".")


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)
