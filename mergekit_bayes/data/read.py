"""Reading rows as they were written, each with its place, through the `datasets` library.

Local files are streamed: nothing of them is kept in a cache that could outlive a change of the file. Text files are
streamed as lines and taken apart here, because readers of JSON and CSV that infer a schema change values on the way: a
column of dates becomes time stamps, `NA` becomes nothing, a missing comma shifts columns. Data sets of the hub come
through its cache, which knows them by commit.
"""

from __future__ import annotations

import csv
import glob
import gzip
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mergekit_bayes.checkpoint.files import brief, listed, shown
from mergekit_bayes.data.locate import HubDataset, LocalFiles, SavedFolder, locate
from mergekit_bayes.errors import DataError

if TYPE_CHECKING:
    from mergekit_bayes.recipe.data import DatasetSpec

Tables: TypeAlias = Mapping[str, Sequence[Mapping[str, object]]]
"""Data sets in memory, by the `path` that stands for them in a recipe."""

_LISTS_OF_A_ROW = ("messages", "conversations", "prompt", "completion")
_PEEKED = 1000  # rows whose keys are the columns of a file that does not name its columns


class Place(NamedTuple):
    """Where a row was written."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{shown(self.source)}, {self.unit} {self.number}"


Records: TypeAlias = Iterator[tuple[Place, Mapping[str, object]]]


@dataclass(frozen=True)
class Table:
    """Rows that can be read, more than once.

    Attributes:
        name: what messages and reports call the data set.
        columns: names of the columns; of a JSON file, the keys of its first rows.
        records: starts reading.
        class_names: columns whose integers stand for these names.
        notes: what people should know about what is read.
    """

    name: str
    columns: tuple[str, ...]
    records: Callable[[], Records]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_table(spec: DatasetSpec, *, recipe_dir: Path | None, tables: Tables) -> Table:
    """Opens a data set and finds its columns.

    Args:
        spec: its entry in the recipe.
        recipe_dir: where relative paths may start beside the current directory.
        tables: data sets in memory.

    Raises:
        DataError: it cannot be found or read, or has no rows.
    """
    if spec.path in tables:
        return _in_memory(spec.path, tables[spec.path])
    found = locate(spec, recipe_dir)
    match found:
        case LocalFiles():
            return _local(found, shown(spec.path))
        case SavedFolder(path):
            with _explained(path):
                import datasets

                return _loaded(datasets.load_from_disk(str(path)), str(path))
        case HubDataset():
            return _loaded(_from_hub(spec, found), spec.path)


def _in_memory(name: str, rows: Sequence[Mapping[str, object]]) -> Table:
    if hasattr(rows, "column_names"):  # a datasets.Dataset
        return _loaded(rows, name)

    def records() -> Records:
        for number, row in enumerate(rows):
            place = Place(name, "row", number)
            yield place, _object(place, row)

    return _table(shown(name), records)


def _local(files: LocalFiles, name: str) -> Table:
    reader = {"jsonl": _json_lines, "json": _json, "csv": _csv, "tsv": _csv, "parquet": _parquet, "txt": _documents}
    read = reader[files.kind]
    notes = (f"not read: {listed(files.beside, 5)}",) if files.beside else ()
    return _table(name, lambda: (entry for path in files.paths for entry in read(path)), notes)


def _table(name: str, records: Callable[[], Records], notes: tuple[str, ...] = ()) -> Table:
    columns = tuple(dict.fromkeys(key for _, row in itertools.islice(records(), _PEEKED) for key in row))
    if not columns:
        raise DataError(f"{name}: holds no rows; expected at least one")
    return Table(name, columns, records, notes=notes)


def _loaded(dataset: Any, name: str) -> Table:
    """A `datasets.Dataset`."""
    if not len(dataset):
        raise DataError(f"{shown(name)}: holds no rows; expected at least one")
    class_names = {
        column: tuple(feature.names) for column, feature in dataset.features.items() if hasattr(feature, "names")
    }

    def records() -> Records:
        with _explained(Path(name)):
            for number, row in enumerate(dataset):
                yield Place(name, "row", number), row

    return Table(shown(name), tuple(dataset.column_names), records, class_names)


def _from_hub(spec: DatasetSpec, found: HubDataset) -> Any:
    import datasets

    asked = f"{shown(found.name)}@{shown(found.revision)}" if found.revision else shown(found.name)
    what = f"{asked}: is no local file or folder, and cannot be had from the hub"
    try:
        with _quiet():
            return datasets.load_dataset(found.name, spec.name, split=spec.split, revision=found.revision)
    except Exception as error:  # the hub's client lets its HTTP library's own exceptions through
        reason = " ".join(str(error).split()) or type(error).__name__
        if datasets.config.HF_HUB_OFFLINE:
            what += " or its cache while HF_HUB_OFFLINE is set"
        raise DataError(f"{what}: {shown(reason)}") from error


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
    with tempfile.TemporaryDirectory(prefix="mergekit-bayes-") as scratch, _explained(path), _quiet():
        # a path is a pattern to `datasets`: unescaped, `a[1].jsonl` reads as empty
        files = {"train": [glob.escape(str(path))]}
        stream = datasets.load_dataset(
            builder, data_files=files, split="train", streaming=True, cache_dir=scratch, **options
        )
        yield from stream


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what `datasets` and its readers raise while reading a file into one message."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path)) from error
    except Exception as error:  # each reader and each decompressor has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{shown(path)}: cannot be read: {shown(reason)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
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
            yield place, _object(place, _parsed(place, line))


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


def _object(place: Place, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise DataError(f'{place}: found {brief(value)}; expected an object such as {{"text": "..."}}')
    return value


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
        yield place, _object(place, entry)


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


def _documents(path: Path) -> Records:
    yield Place(str(path), "line", 1), {"text": "".join(_lines(path, sample_by="document"))}
