"""The log of a run: one JSON object per line, in a file that grows and in memory, for plots and trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from mergekit_bayes.checkpoint.disk import disk_errors
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import CheckpointError

__all__ = ["LOG_NAME", "LogBook", "flat"]

LOG_NAME = "log.jsonl"


class LogBook:
    """Collects rows and writes each to the file at once.

    Args:
        path: the file, which is begun anew; None keeps rows in memory only, as in processes that do not write.
        text: the log of the run up to here, from a checkpoint.

    Raises:
        CheckpointError: `text` is no log.
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path | None, text: str = "") -> None:
        self.rows: list[dict[str, Any]] = [_parsed(line) for line in text.splitlines()]
        self._path = path
        self._file: TextIO | None = None
        if path is not None:
            with disk_errors(path, "write"):
                path.write_text(text, encoding="utf-8")
                self._file = path.open("a", encoding="utf-8")

    @property
    def text(self) -> str:
        """The whole log."""
        return "".join(_line(row) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row; numbers that are not finite become null, which JSON has a word for.

        Raises:
            OutputError: the disk failed.
        """
        clean = {key: _clean(value) for key, value in row.items()}
        self.rows.append(clean)
        if self._file is not None and self._path is not None:
            with disk_errors(self._path, "write"):
                self._file.write(_line(clean))
                self._file.flush()

    def last(self, key: str) -> Any:
        """Returns the newest value under a key; None if there is none."""
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numbers of a row under names such as `eval/held_out/loss`, as trackers want them."""
    found: dict[str, float] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found.update(flat(value, f"{name}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _clean(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"log of a checkpoint: {shown(line)} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise CheckpointError(f"log of a checkpoint: {shown(line)}; expected an object")
    return row
