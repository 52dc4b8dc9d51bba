"""A data set from its first to its last row: read, checked, tokenised, cut to length, counted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_bayes.data.columns import Columns
from mergekit_bayes.data.files import Place
from mergekit_bayes.data.formats import Encoders, Labelled, LabelledReader, QuestionReader, reader_for
from mergekit_bayes.data.labels import FoundLabels, label_indices
from mergekit_bayes.data.questions import predicts_every_choice
from mergekit_bayes.data.read import Table
from mergekit_bayes.data.report import DatasetReport
from mergekit_bayes.data.rows import Encoded
from mergekit_bayes.errors import DataError

_BATCH = 500  # rows that are tokenised at once

LongRows = Literal["truncate", "drop", "refuse"]


@dataclass(frozen=True)
class Limit:
    """How long rows may be.

    Attributes:
        max_length: in tokens; None for any length.
        long_rows: what becomes of longer ones.
    """

    max_length: int | None
    long_rows: LongRows = "truncate"


@dataclass(frozen=True)
class EncodedSet:
    """A data set as rows of tokens.

    Attributes:
        report: what became of its rows so far.
        rows: its rows.
        labels: the labels it has; None for language models.
        label_of: name of each row's label.
    """

    report: DatasetReport
    rows: Sequence[Encoded]
    labels: FoundLabels | None = None
    label_of: Sequence[str] = ()

    def with_classes(self, names: Sequence[str]) -> EncodedSet:
        """The same rows with the index of their class.

        Raises:
            DataError: a label is none of `names`.
        """
        assert self.labels is not None
        indices = label_indices(self.labels, names)
        pairs = zip(self.rows, self.label_of, strict=True)
        rows = [dataclasses.replace(row, label=indices[name]) for row, name in pairs]
        return dataclasses.replace(self, rows=rows, label_of=())


def encode(
    table: Table,
    columns: Columns,
    encoders: Encoders,
    *,
    limit: Limit,
    max_rows: int | None,
    report: DatasetReport,
    on_progress: Callable[[str, int], None] | None = None,
) -> EncodedSet:
    """Reads a data set.

    Args:
        table: the opened data set.
        columns: what its rows are.
        encoders: of the run.
        limit: how long rows may be.
        max_rows: read only the first so many rows.
        report: is filled in.
        on_progress: told the name of the data set and the rows read so far, now and then.

    Raises:
        DataError: a row cannot be learned from, rows are too long where that is refused, or none is left.
    """
    reader = reader_for(columns, encoders, table.class_names)
    before = encoders.remarks()
    fitting = _Fitting(limit, report)
    rows: list[Encoded] = []
    label_of: list[str] = []
    records = itertools.islice(table.records(), max_rows)
    while batch := list(itertools.islice(records, _BATCH)):
        taken = [(place, reader.take(place, row)) for place, row in batch]
        found = [(place, content) for place, content in taken if content is not None]
        keys = [_digest(reader.key(content), place) for place, content in found]
        report.read += len(batch)
        report.empty += len(batch) - len(found)
        encoded = reader.encode([content for _, content in found])
        for (place, content), key, row in zip(found, keys, encoded, strict=True):
            kept = fitting.fit(row, reader, place, content)
            if kept is not None:
                rows.append(dataclasses.replace(kept, key=key))
                label_of += [content.label] if isinstance(content, Labelled) else []
        if on_progress is not None:
            on_progress(report.name, report.read)
    fitting.check()
    report.notes += [
        f"{count - before[what]:,} {what}" for what, count in encoders.remarks().items() if count > before.get(what, 0)
    ]
    if not rows:
        raise DataError(f"{table.name}: none of its {report.read:,} rows can be learned from: {report.losses}")
    return EncodedSet(report, rows, reader.labels if isinstance(reader, LabelledReader) else None, label_of)


class _Fitting:
    """Cuts or counts rows that are too long."""

    def __init__(self, limit: Limit, report: DatasetReport) -> None:
        self._limit, self._report = limit, report
        self._refused: list[Place] = []

    def fit(self, row: Encoded, reader: Any, place: Place, content: Any) -> Encoded | None:
        """The row, cut if need be; None if it is left out."""
        report, limit = self._report, self._limit.max_length
        length = len(row.tokens)
        report.longest = max(report.longest, row.width)
        if limit is not None and row.width > limit:
            if self._limit.long_rows != "truncate":
                self._refused += [place] if self._limit.long_rows == "refuse" else []
                report.too_long += 1
                return None
            if isinstance(reader, LabelledReader):
                (row,) = reader.encode([content], max_length=limit)
            elif isinstance(reader, QuestionReader):
                cut = reader.cut(row, limit)
                if cut is None:
                    report.too_long += 1
                    return None
                row = cut
            else:
                assert row.targets is not None
                row = dataclasses.replace(row, tokens=row.tokens[:limit], targets=row.targets[:limit])
        if row.targets is not None and not _predicts(row):
            report.without_target += 1
            return None
        report.truncated += len(row.tokens) < length
        report.cut_tokens += length - len(row.tokens)
        return row

    def check(self) -> None:
        """Refuses rows that are too long, where the recipe says so."""
        if self._refused:
            report = self._report
            raise DataError(
                f"{self._refused[0]}: is longer than max_length, as {report.too_long:,} of {report.read:,} rows are; "
                f"the longest has {report.longest:,} tokens; expected at most {self._limit.max_length:,}: raise "
                "`data.max_length`, or let `data.long_rows` truncate or drop them"
            )


def _predicts(row: Encoded) -> bool:
    if row.choice_bytes is not None:
        return predicts_every_choice(row)
    return bool(row.targets is not None and row.targets.any())


def _digest(text: str, place: Place) -> bytes:
    try:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: holds half of a surrogate pair, which is no text") from error
