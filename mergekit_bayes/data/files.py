"""Reading local files as they were written, row by row, each row with its place.

Files are streamed through the `datasets` library: nothing of them is kept in a cache that could outlive a change of the
file. Text files are streamed as lines and taken apart here, because readers of JSON and CSV that infer a schema change
values on the way: a column of dates becomes time stamps, `NA` becomes nothing, a missing comma shifts columns.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from mergekit_bayes.checkpoint.files import brief, listed, shown
from mergekit_bayes.errors import DataError

_LISTS_OF_A_ROW = ("messages", "conversations", "prompt", "completion")


class Place(NamedTuple):
    """Where a row was written."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{shown(self.source)}, {self.unit} {self.number}"


Records: TypeAlias = Iterator[tuple[Place, Mapping[str, object]]]


def file_records(path: Path, kind: str) -> Records:
    """The rows of a file.

    Args:
        path: the file.
        kind: one of `locate.KINDS`.

    Raises:
        DataError: it cannot be read, with the line where known.
    """
    reader = {"jsonl": _json_lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet, "txt": _document}
    return reader[kind](path)


def row_at(place: Place, value: object) -> Mapping[str, object]:
    """A value as a row.

    Raises:
        DataError: it is no mapping from columns to values.
    """
    if not isinstance(value, Mapping):
        raise DataError(f'{place}: found {brief(value)}; expected an object such as {{"text": "..."}}')
    return value


def _lines(path: Path, *, sample_by: str = "line") -> Iterator[str]:
    yield from (row["text"] for row in _stream("text", path, encoding="utf-8-sig", sample_by=sample_by))


def _stream(builder: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of one file as `datasets` streams them; line ends are kept."""
    import datasets

    if builder == "text":
        options["keep_linebreaks"] = True
    if "::" in str(path):
        raise DataError(f"{shown(path)}: `::` in a path means something else to the datasets library; rename it")
    # even streaming leaves lock files in its cache folder
    with tempfile.TemporaryDirectory(prefix="mergekit-bayes-") as scratch, explained(path), quiet():
        # a path is a pattern to `datasets`: unescaped, `a[1].jsonl` reads as empty
        files = {"train": [glob.escape(str(path))]}
        stream = datasets.load_dataset(
            builder, data_files=files, split="train", streaming=True, cache_dir=scratch, **options
        )
        yield from stream


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what `datasets` and its readers raise while reading a file into one message."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path)) from error
    except Exception as error:  # each reader and each decompressor has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{shown(path)}: cannot be read: {shown(reason)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: failures arrive as errors."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _not_utf8(path: Path) -> str:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                wide = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
                seen = "the file is UTF-16" if wide else f"byte 0x{line[error.start]:02x} is not UTF-8"
                return f"{Place(str(path), 'line', number)}: {seen}; expected UTF-8, save it as that"
    return f"{shown(path)}: is not UTF-8; save it as that"


def _json_lines(path: Path) -> Records:
    return _objects(path, _lines(path))


def _objects(path: Path, lines: Iterable[str]) -> Records:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = Place(str(path), "line", number)
            yield place, row_at(place, _parsed(place, line.rstrip()))


def _parsed(place: Place, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(place, error) from error


def _no_json(place: Place, error: ValueError | RecursionError) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(f"{place}, column {error.colno}: is no JSON: {error.msg}")
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return DataError(f"{place}: is no JSON that can be read: {reason}")


def _json(path: Path) -> Records:
    text = "".join(_lines(path, sample_by="document"))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            if error.msg == "Extra data":  # one object per line under this name is common
                yield from _objects(path, text.split("\n"))
                return
            raise _no_json(Place(str(path), "line", error.lineno), error) from error
        raise _no_json(Place(str(path), "line", 1), error) from error
    for number, entry in enumerate(_rows_of(path, value)):
        place = Place(str(path), "entry", number)
        yield place, row_at(place, entry)


def _rows_of(path: Path, value: object) -> list[object]:
    """The rows of a JSON document: a list, or an object with one list of rows in it; any other object is one row."""
    if isinstance(value, dict):
        inside = [entry for key, entry in value.items() if key not in _LISTS_OF_A_ROW and _is_list_of_objects(entry)]
        return inside[0] if len(inside) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"{Place(str(path), 'line', 1)}: found {brief(value)}; expected a list of objects")
    return value


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _csv(path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB, is less than many texts have
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    reader = csv.reader(_lines(path), strict=True, delimiter="\t" if tabs else ",")
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{Place(str(path), 'line', number)}: is no CSV: {error}") from error
        if values is None:
            return
        place = Place(str(path), "line", number)
        if header is None:
            header = values
            if len(set(header)) < len(header):
                raise DataError(f"{place}: the header names a column twice: {listed(header)}")
        elif values:
            if len(values) != len(header):
                seen = f"has {len(values)} fields where the header has {len(header)} ({listed(header, 5)})"
                raise DataError(f"{place}: {seen}; expected fields that contain commas or line ends in double quotes")
            yield place, dict(zip(header, values, strict=True))


def _parquet(path: Path) -> Records:
    for number, row in enumerate(_stream("parquet", path)):
        yield Place(str(path), "row", number), row


def _document(path: Path) -> Records:
    yield Place(str(path), "line", 1), {"text": "".join(_lines(path, sample_by="document"))}
