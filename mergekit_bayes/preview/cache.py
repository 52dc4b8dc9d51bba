"""Every evaluated mix, one JSON line each, under a key of its inputs: what was evaluated once is not evaluated again.

Lines are appended and flushed as they come, so that a killed sweep loses the mix it was at; a line that was cut short
is passed over. Every process of several has a file of its own and reads those of all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.disk import disk_errors

__all__ = ["EvaluationCache", "key_of"]

_NAME = "evaluations"


def key_of(*parts: object) -> str:
    """Hex digest of anything JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class EvaluationCache:
    """Records by key, on disk.

    Args:
        folder: where the files lie.
        rank: whose file is appended to.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self._folder = folder
        self._path = folder / (f"{_NAME}.jsonl" if rank == 0 else f"{_NAME}.{rank}.jsonl")

    def read(self) -> dict[str, Mapping[str, Any]]:
        """Every record by its key, the last one of several; those of other processes too.

        Raises:
            OutputError: the disk failed.
        """
        found: dict[str, Mapping[str, Any]] = {}
        for path in sorted(self._folder.glob(f"{_NAME}*.jsonl")):
            with disk_errors(path, "read"):
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found.update((record["key"], record) for record in _records(lines))
        return found

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends records, each with its `key`, and waits until the disk has them.

        Raises:
            OutputError: the disk failed.
        """
        text = "".join(json.dumps(record) + "\n" for record in records)
        with disk_errors(self._path, "write"), self._path.open("ab") as file:
            # a line that was cut short ends here, and not in the first of ours
            file.write(b"\n" * (file.tell() > 0) + text.encode())
            file.flush()
            os.fsync(file.fileno())

    def clear(self) -> None:
        """Forgets everything.

        Raises:
            OutputError: the disk failed.
        """
        for path in self._folder.glob(f"{_NAME}*.jsonl"):
            with disk_errors(path, "remove"):
                path.unlink()


def _records(lines: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short when a process was killed
        if isinstance(record, dict) and isinstance(record.get("key"), str):
            yield record
