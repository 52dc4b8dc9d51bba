"""What an interrupted merge had finished, told by one small durable file per finished item."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.disk import disk_errors, sync_file, sync_folder, write_atomically
from mergekit_bayes.errors import OutputError

Record = dict[str, Any]
"""What is remembered about a finished item: anything that JSON can hold."""


class Journal:
    """The finished items of one job; several processes may add to it at once.

    Args:
        folder: where the entries are.
        staging: where the files they speak of are.
    """

    def __init__(self, folder: Path, staging: Path) -> None:
        self.folder = folder
        self.staging = staging

    def add(self, item: str, record: Record, files: Sequence[str]) -> None:
        """Remember that `item` is finished, once all its files are safe on the disk.

        Args:
            item: any name.
            record: what `get` shall return.
            files: paths of the item's files inside the staging folder.

        Raises:
            OutputError: a file is missing or the disk failed.
        """
        sizes: dict[str, int] = {}
        for name in sorted(files):
            with disk_errors(self.staging / name, "synchronise"):
                sync_file(self.staging / name)
                sizes[name] = (self.staging / name).stat().st_size
        with disk_errors(self.staging, "synchronise"):
            sync_folder(self.staging)
        entry = {"item": item, "files": sizes, "record": record}
        write_atomically(self._path(item), json.dumps(entry, sort_keys=True).encode())

    def remove(self, item: str) -> None:
        """Forget `item` and delete its files, the entry first: an item without an entry was never finished.

        Folders that become empty go with their files.

        Raises:
            OutputError: the disk failed.
        """
        entry = self._read(self._path(item))
        with disk_errors(self._path(item), "remove"):
            self._path(item).unlink(missing_ok=True)
            sync_folder(self.folder)
        for name in () if entry is None else entry["files"]:
            path = self.staging / name
            with disk_errors(path, "remove"):
                path.unlink(missing_ok=True)
                for folder in path.parents:
                    if folder == self.staging or any(folder.iterdir()):
                        break
                    folder.rmdir()

    def get(self, item: str) -> Record | None:
        """The record of `item`, or None if it is not finished or its files are no longer what they were."""
        entry = self._read(self._path(item))
        return None if entry is None else entry["record"]

    def files(self) -> frozenset[Path]:
        """Every file in the staging folder that belongs to a finished item."""
        return frozenset(self.staging / name for entry in self._entries() for name in entry["files"])

    def __bool__(self) -> bool:
        return any(True for _ in self._entries())

    def _path(self, item: str) -> Path:
        # Hashed because an item may have any name, and a file may not.
        return self.folder / f"{blake2b(item.encode(), digest_size=16).hexdigest()}.json"

    def _entries(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            entry = self._read(path)
            if entry is not None:
                yield entry

    def _read(self, path: Path) -> Record | None:
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{path}: cannot read: {error.strerror}") from error
        try:
            entry: Record = json.loads(text)
        except ValueError:
            return None  # damaged by a failing disk: doing the work again is always safe
        for name, size in entry["files"].items():
            try:
                status = os.lstat(self.staging / name)
            except FileNotFoundError:
                return None
            if status.st_size != size:
                return None
        return entry
