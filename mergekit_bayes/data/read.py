"""Opening data sets: local files, folders saved by `datasets`, the hub, and rows in memory.

Data sets of the hub come through the cache of the `datasets` library, which knows them by commit. Local files are read
anew every time.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.data.files import Place, Records, explained, file_records, quiet, row_at
from mergekit_bayes.data.locate import HubDataset, LocalFiles, SavedFolder, locate
from mergekit_bayes.errors import DataError

if TYPE_CHECKING:
    from mergekit_bayes.recipe.data import DatasetSpec

Tables: TypeAlias = Mapping[str, Sequence[Mapping[str, object]]]
"""Data sets in memory, by the `path` that stands for them in a recipe."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PEEKED = 1000  # rows whose keys are the columns of a file that does not name its columns


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
        return _in_memory(spec, tables[spec.path])
    found = locate(spec, recipe_dir)
    match found:
        case LocalFiles():
            return _local(spec, found)
        case SavedFolder(path):
            with explained(path):
                import datasets

                return _loaded(datasets.load_from_disk(str(path)), str(path))
        case HubDataset():
            return _from_hub(spec, found)


def _in_memory(spec: DatasetSpec, rows: Sequence[Mapping[str, object]]) -> Table:
    if hasattr(rows, "column_names"):  # a datasets.Dataset
        return _loaded(rows, spec.path)

    def records() -> Records:
        for number, row in enumerate(rows):
            place = Place(spec.path, "row", number)
            yield place, row_at(place, row)

    return _table(spec, records)


def _local(spec: DatasetSpec, files: LocalFiles) -> Table:
    notes = (f"not read: {listed(files.beside, 5)}",) if files.beside else ()
    return _table(spec, lambda: (row for path in files.paths for row in file_records(path, files.kind)), notes)


def _table(spec: DatasetSpec, records: Callable[[], Records], notes: tuple[str, ...] = ()) -> Table:
    peeked = itertools.islice(records(), min(_PEEKED, spec.max_rows or _PEEKED))
    columns = tuple(dict.fromkeys(key for _, row in peeked for key in row))
    if not columns:
        raise DataError(f"{shown(spec.path)}: holds no rows; expected at least one")
    return Table(shown(spec.path), columns, records, notes=notes)


def _loaded(dataset: Any, name: str) -> Table:
    """A `datasets.Dataset`."""
    if not len(dataset):
        raise DataError(f"{shown(name)}: holds no rows; expected at least one")
    class_names = {
        column: tuple(feature.names) for column, feature in dataset.features.items() if hasattr(feature, "names")
    }

    def records() -> Records:
        with explained(Path(name)):
            for number, row in enumerate(dataset):
                yield Place(name, "row", number), row

    return Table(shown(name), tuple(dataset.column_names), records, class_names)


def _from_hub(spec: DatasetSpec, found: HubDataset) -> Table:
    """A data set of the hub at a commit that is known, never at whatever an unreachable hub left in the cache."""
    import datasets
    import huggingface_hub

    asked = f"{shown(found.name)}@{shown(found.revision)}" if found.revision else shown(found.name)
    offline = datasets.config.HF_HUB_OFFLINE
    commit = found.revision if _COMMIT.fullmatch(found.revision or "") else None
    if offline and found.revision and commit is None:
        raise DataError(
            f"{asked}: HF_HUB_OFFLINE is set, so nobody can say which commit this is; expected the 40 digits of one"
        )
    try:
        if not offline and commit is None:
            commit = huggingface_hub.HfApi().dataset_info(found.name, revision=found.revision, timeout=30).sha
        with quiet():
            dataset = datasets.load_dataset(found.name, spec.name, split=spec.split, revision=commit)
    except Exception as error:  # the hub's client lets its HTTP library's own exceptions through
        reason = " ".join(str(error).split()) or type(error).__name__
        where = "the hub, or its cache while HF_HUB_OFFLINE is set" if offline else "the hub"
        advice = "" if offline else "; set HF_HUB_OFFLINE=1 to use what the cache holds"
        message = f"{asked}: is no local file or folder, and cannot be had from {where}: {shown(reason)}"
        raise DataError(f"{message}{advice}") from error
    given = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if commit is not None and given - {commit}:
        raise DataError(f"{asked}: the cache gave commit {listed(sorted(given))}; expected {commit}")
    table = _loaded(dataset, spec.path)
    return dataclasses.replace(table, notes=tuple(f"commit {name}" for name in sorted(given)))
