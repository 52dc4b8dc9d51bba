"""What the rows of a data set are: its format, and which of its columns hold what.

text                text
prompt_completion   prompt, completion: texts, or lists of messages
messages            messages: a list of {role, content}
labelled            text, label, and text_pair where rows are pairs of texts
multiple_choice     question, choices and answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    "multiple_choice": ("multiple_choice",),
}
# what others call the columns; named in messages only, since a guess would be trained on
_CALLED: Mapping[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog"),
    "prompt": ("instruction", "question", "query", "input", "source"),
    "completion": ("output", "response", "answer", "chosen", "target"),
    "text": ("content", "sentence", "sentence1", "body", "document", "review", "premise", "markdown", "code"),
    "text_pair": ("sentence2", "hypothesis", "text_b"),
    "label": ("labels", "category", "class", "target", "sentiment", "intent", "coarse_label"),
    "question": ("ctx", "query", "prompt", "goal", "stem", "context", "text", "sentence"),
    "choices": ("endings", "options", "answers", "candidates", "mc1_targets"),
    "answer": ("answerkey", "label", "gold", "correct", "target", "answer_idx", "correct_answer"),
}


@dataclass(frozen=True)
class Columns:
    """How the rows of one data set are to be read.

    Attributes:
        format: what they are.
        names: standard name -> name in the data set, for the columns of the format; where several columns stand for
            one, all their names.
        unused: columns that are not looked at.
        parts: standard name -> names in the data set, where several columns hold one entry each of a list.
        separator: between a question and each of its choices.
    """

    format: Format
    names: Mapping[str, str]
    unused: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    separator: str = " "

    def value(self, row: Mapping[str, object], standard: str) -> object:
        """The value of a column under its standard name; None where the row has none."""
        if standard in self.parts:
            return _entries(row, self.parts[standard])
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
    given = {standard: (name,) if isinstance(name, str) else name for standard, name in spec.columns.items()}
    absent = [name for found in given.values() for name in found if name not in table.columns]
    if absent:
        raise DataError(
            f"{table.name}: has no column `{absent[0]}`, which `columns` names{_there_are(table, absent[0])}"
        )
    standards = [standard for fields in FORMAT_COLUMNS.values() for standard in fields]
    names = {standard: given.get(standard, (standard,)) for standard in standards}
    names = {standard: found for standard, found in names.items() if set(found) <= set(table.columns)}
    chosen = spec.format or _from_columns(table, names, task)
    if chosen not in _FORMATS[task]:
        fitting = " or ".join(_FORMATS[task])
        raise DataError(f"{table.name}: is read as `{chosen}`, which {_not_for(chosen, task)}; expected {fitting}")
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
    if spec.separator is not None and chosen != "multiple_choice":
        raise DataError(f"{table.name}: `separator` has no effect on the format `{chosen}`; remove it")
    used = {standard: names[standard] for standard in wanted if standard in names}
    read = {name for found in used.values() for name in found}
    return Columns(
        chosen,
        {standard: ", ".join(found) for standard, found in used.items()},
        tuple(name for name in table.columns if name not in read),
        {standard: found for standard, found in used.items() if not isinstance(spec.columns.get(standard, ""), str)},
        " " if spec.separator is None else spec.separator,
    )


def _not_for(chosen: Format, task: Task) -> str:
    if chosen == "multiple_choice":
        return "holds questions to evaluate with `task: multiple_choice` and nothing to learn from"
    return f"{task} cannot learn from"


def _entries(row: Mapping[str, object], names: Sequence[str]) -> list[object]:
    """What the columns of a list hold; a row may have fewer entries than there are columns."""
    found = [row.get(name) for name in names]
    while found and found[-1] is None:
        found.pop()
    return found


def _from_columns(table: Table, names: Mapping[str, Sequence[str]], task: Task) -> Format:
    for candidate in _FORMATS[task]:
        if all(name in names or name in _OPTIONAL for name in FORMAT_COLUMNS[candidate]):
            return candidate
    needed = ", or ".join(
        _quoted([name for name in FORMAT_COLUMNS[candidate] if name not in _OPTIONAL]) for candidate in _FORMATS[task]
    )
    hint = next(filter(None, (_mapping_hint(table, FORMAT_COLUMNS[name]) for name in _FORMATS[task])), "")
    if task == "causal_lm" and all(name in names for name in FORMAT_COLUMNS["multiple_choice"]):
        hint = "; multiple-choice questions are evaluated with `task: multiple_choice`"
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
