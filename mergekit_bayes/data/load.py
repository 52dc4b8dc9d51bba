"""All data of a run: opened, encoded, held out, packed and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.data.columns import Columns, choose_columns
from mergekit_bayes.data.encode import EncodedSet, Limit, encode
from mergekit_bayes.data.formats import Encoders
from mergekit_bayes.data.held_out import hold_out, without_held_out
from mergekit_bayes.data.labels import FoundLabels, label_names
from mergekit_bayes.data.locate import find
from mergekit_bayes.data.order import epoch_shares
from mergekit_bayes.data.packing import pack, windows
from mergekit_bayes.data.read import Table, Tables, open_table
from mergekit_bayes.data.report import DataReport, DatasetReport
from mergekit_bayes.data.rows import Encoded, Rows, Task, mixture
from mergekit_bayes.errors import DataError

if TYPE_CHECKING:
    from mergekit_bayes.recipe.data import DatasetSpec, DataSpec

Role = Literal["train", "eval"]

_NO_LIMIT = 10**9  # tokenizers without a limit of their own say 10^30


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is measured on.

    Attributes:
        train: the training rows.
        eval: the held-out rows of each held-out data set, by its name; empty without held-out data.
        labels: names of the classes, in order; None for language models.
        max_length: tokens per row, at most.
        chat_template: Jinja source that replaced the tokenizer's own; belongs into the tokenizer that is saved.
        report: what became of the rows.
    """

    train: Rows
    eval: Mapping[str, Rows]
    labels: tuple[str, ...] | None
    max_length: int
    chat_template: str | None
    report: DataReport


@dataclass(frozen=True)
class _Source:
    spec: DatasetSpec
    role: Role
    name: str
    table: Table
    columns: Columns


def load_training_data(
    spec: DataSpec,
    tokenizer: Any,
    *,
    task: Task,
    recipe_dir: Path | None = None,
    tables: Tables | None = None,
    on_progress: Callable[[str, int], None] | None = None,
) -> TrainingData:
    """Reads all data of a run; the same rows on every process and for every seed.

    Args:
        spec: the section `data` of a recipe.
        tokenizer: of transformers.
        task: what the model learns.
        recipe_dir: where relative paths may start beside the current directory.
        tables: data sets in memory (lists of mappings, or `datasets.Dataset`), by the `path` that stands for them.
        on_progress: told the name of the data set that is being read and the rows read so far, now and then.

    Raises:
        DataError: something cannot be read or learned from; what is wrong with files and columns comes all at once.
    """
    _check(spec, task)
    sources = _open(spec, task, recipe_dir, tables or {})
    template = None if spec.chat_template is None else _read_template(spec.chat_template, recipe_dir)
    whole = not spec.completion_only_loss
    encoders = Encoders(tokenizer, append_eos=spec.append_eos, whole=whole, template=template)
    max_length = min(spec.max_length, _own_limit(tokenizer))
    encoded = [(source.role, _encode(source, encoders, spec, max_length, on_progress)) for source in sources]
    if template is not None and not encoders.chatted:
        raise DataError("`data.chat_template` has no effect, no data set holds conversations; remove it")
    train = [entry for role, entry in encoded if role == "train"]
    held = [entry for role, entry in encoded if role == "eval"]
    labels = None
    if task == "sequence_classification":
        labels = spec.labels or label_names([_labels(entry) for entry in train])
        train, held = ([entry.with_classes(labels) for entry in entries] for entries in (train, held))
    if spec.eval_fraction is not None:
        train, held = hold_out(train, spec.eval_fraction)
    train = without_held_out(train, held)
    train, held = ([_packed(entry, spec, max_length) for entry in entries] for entries in (train, held))
    weights = [source.spec.weight for source in sources if source.role == "train"]
    parts = [(entry.report.name, entry.rows, weight) for entry, weight in zip(train, weights, strict=True)]
    rows = mixture(parts, task=task)
    for entry, share in zip(train, epoch_shares(rows), strict=True):
        entry.report.share = share / len(rows) if len(train) > 1 else None
    evaluated = {entry.report.name: mixture([(entry.report.name, entry.rows, None)], task=task) for entry in held}
    report = _report([*train, *held], [Rows(e.rows, task=task) for e in train] + list(evaluated.values()))
    notes = [] if max_length == spec.max_length else [_limited(spec.max_length, max_length)]
    notes += _absent_labels(labels, train)
    return TrainingData(rows, evaluated, labels, max_length, template, DataReport(report, tuple(notes)))


def _check(spec: DataSpec, task: Task) -> None:
    weights = [entry.weight for entry in spec.train]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        raise DataError("some training data sets have a `weight` and some have none; expected one for all, or for none")
    if spec.eval and spec.eval_fraction is not None:
        raise DataError("both `data.eval` and `data.eval_fraction`; expected one of them")
    if spec.packing and task != "causal_lm":
        raise DataError(f"`data.packing` has no meaning for {task}, where a row is one example; remove it")
    if spec.labels is not None and task == "multiple_choice":
        raise DataError("`data.labels` has no meaning for multiple_choice, where every row has its choices; remove it")


def _open(spec: DataSpec, task: Task, recipe_dir: Path | None, tables: Tables) -> list[_Source]:
    """Every data set with its columns, or everything that is wrong with any."""
    entries: list[tuple[Role, DatasetSpec]] = [("train", entry) for entry in spec.train]
    entries += [("eval", entry) for entry in spec.eval]
    names = [name for role in ("train", "eval") for name in _names([entry for r, entry in entries if r == role])]
    problems: list[str] = []
    sources = []
    for (role, entry), name in zip(entries, names, strict=True):
        try:
            table = open_table(entry, recipe_dir=recipe_dir, tables=tables)
            sources.append(_Source(entry, role, name, table, choose_columns(table, entry, task)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))
    return sources


def _names(entries: Sequence[DatasetSpec]) -> list[str]:
    """What reports call data sets: the shortest of these names that is theirs alone."""
    spellings: Sequence[Callable[[DatasetSpec], str]] = (
        lambda entry: PurePath(entry.path.removesuffix(".gz")).stem,
        lambda entry: entry.path,
        lambda entry: f"{entry.path}:{entry.split}",
        lambda entry: ":".join(filter(None, (entry.path, entry.name, entry.split))),
    )
    for spelling in spellings:
        names = [spelling(entry) for entry in entries]
        if len(set(names)) == len(names):
            return names
    return [f"{name}#{index + 1}" for index, name in enumerate(names)]


def _encode(
    source: _Source,
    encoders: Encoders,
    spec: DataSpec,
    max_length: int,
    on_progress: Callable[[str, int], None] | None,
) -> EncodedSet:
    report = DatasetReport(
        name=source.name,
        path=source.spec.path,
        role=source.role,
        format=source.columns.format,
        unused_columns=source.columns.unused,
        notes=list(source.table.notes),
    )
    if source.columns.format == "messages" and "tools" in source.columns.unused:
        report.notes.append("the column tools is not read: the chat template does not see what tools there are")
    windowed = spec.packing and source.columns.format == "text"
    limit = Limit(None) if windowed else Limit(max_length, spec.long_rows)
    return encode(
        source.table,
        source.columns,
        encoders,
        limit=limit,
        max_rows=source.spec.max_rows,
        report=report,
        on_progress=on_progress,
    )


def _packed(entry: EncodedSet, spec: DataSpec, max_length: int) -> EncodedSet:
    rows: Sequence[Encoded] = entry.rows
    entry.report.segments = len(rows)
    if spec.packing:
        # windows are one segment each, so that a mixture has rows of one kind
        windowed = [dataclasses.replace(row, segments=(len(row.tokens),)) for row in windows(rows, max_length)]
        rows = windowed if entry.report.format == "text" else pack(rows, max_length)
    return dataclasses.replace(entry, rows=rows)


def _report(sets: Sequence[EncodedSet], rows: Sequence[Rows]) -> tuple[DatasetReport, ...]:
    for entry, part in zip(sets, rows, strict=True):
        entry.report.rows, entry.report.tokens, entry.report.units = len(part), part.num_tokens, part.num_units
    return tuple(entry.report for entry in sets)


def _labels(entry: EncodedSet) -> FoundLabels:
    assert entry.labels is not None
    return entry.labels


def _absent_labels(labels: Sequence[str] | None, train: Sequence[EncodedSet]) -> list[str]:
    if labels is None:
        return []
    seen = {row.label for entry in train for row in entry.rows}
    absent = [name for index, name in enumerate(labels) if index not in seen]
    return [f"no training row has the label {', '.join(map(shown, absent))}"] if absent else []


def _limited(asked: int, given: int) -> str:
    return f"max_length is {given:,}, the most this model's tokenizer allows; {asked:,} was asked for"


def _own_limit(tokenizer: Any) -> int:
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if limit is not None and 1 < limit < _NO_LIMIT else _NO_LIMIT


def _read_template(path: str, recipe_dir: Path | None) -> str:
    found = find(path, recipe_dir)
    if found is None:
        raise DataError(f"{shown(path)}: there is no such file; expected a chat template (`data.chat_template`)")
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(found)}: cannot be read as a chat template: {error}") from error
    if not text.strip():
        raise DataError(f"{shown(found)}: is empty; expected a chat template")
    return text
