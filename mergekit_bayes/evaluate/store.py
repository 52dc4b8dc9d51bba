"""Blocks that are known already: of a run that was cut short, of the results that stand there, of other processes.

While a run lasts, every finished block is one durable entry of the output's journal. The finished folder holds them as
lines of JSON, `rows/<number>.jsonl`: a first line that says what the numbers depend on, then one line for every row.
Answers of a harness are one line each of `lm_eval.jsonl`, which says of each what it depends on.
A later evaluation that replaces the folder takes from it what it can use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.checkpoint.disk import write_atomically
from mergekit_bayes.errors import OutputError
from mergekit_bayes.evaluate.measure import Measured

if TYPE_CHECKING:
    from mergekit_bayes.checkpoint.output import OutputFolder

__all__ = ["ANSWERS_NAME", "ROWS_FOLDER", "Store", "key_of", "write_rows"]

ROWS_FOLDER, ANSWERS_NAME = "rows", "lm_eval.jsonl"


def key_of(identity: Mapping[str, object]) -> str:
    """Digest of what some numbers depend on."""
    return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


class Store:
    """What is known, in memory and on disk.

    Args:
        folder: of the output, entered; None to remember nothing beyond this run.
        before: folder with results of an earlier run; need not exist.
    """

    def __init__(self, folder: OutputFolder | None, before: Path | None = None) -> None:
        self._folder = folder
        self._before = dict(_published(before)) if before is not None else {}
        self._answers = dict(_answers(before)) if before is not None else {}

    def known(self, key: str, block: int, indices: list[int]) -> Measured | None:
        """The numbers of a block; None if they are not known.

        Args:
            key: of what they depend on.
            block: its number.
            indices: its rows.
        """
        published = self._before.get(key)
        if published is not None and all(index in published for index in indices):
            return {index: published[index] for index in indices}
        record = self.get(f"{key}:{block}")
        if record is None or sorted(record["rows"]) != sorted(indices):
            return None
        return dict(zip(record["rows"], record["numbers"], strict=True))

    def keep(self, key: str, block: int, measured: Measured) -> None:
        """Remembers the numbers of a block for good.

        Raises:
            OutputError: the disk failed.
        """
        self.put(f"{key}:{block}", {"rows": list(measured), "numbers": [list(row) for row in measured.values()]})

    def get(self, item: str) -> dict[str, Any] | None:
        """A record of an earlier, unfinished run, or an answer of a finished one; None if there is none."""
        return self._answers.get(item) or (None if self._folder is None else self._folder.finished(item))

    def put(self, item: str, record: dict[str, Any]) -> None:
        """Remembers a record for good."""
        if self._folder is not None:
            self._folder.finish(item, record, files=())


def write_rows(path: Path, head: Mapping[str, object], measured: Measured) -> None:
    """Writes the numbers of all rows, one line for each.

    Args:
        path: of the file.
        head: content of the first line, with their `key`.
        measured: by row.

    Raises:
        OutputError: the disk failed.
    """
    lines = [json.dumps(dict(head), sort_keys=True)]
    lines += [json.dumps({"row": row, "numbers": list(measured[row])}) for row in sorted(measured)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _answers(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a harness said in an earlier run, by item; a file that is not whole is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        for record in map(json.loads, (folder / ANSWERS_NAME).read_text(encoding="utf-8").splitlines()):
            yield record["item"], {key: record[key] for key in ("item", "metrics", "documents")}


def _published(folder: Path) -> Iterator[tuple[str, Measured]]:
    """Key and rows of every file of an earlier run; a file that is not whole is none."""
    places = sorted((folder / ROWS_FOLDER).glob("*.jsonl")) if (folder / ROWS_FOLDER).is_dir() else []
    for path in places:
        with suppress(OSError, ValueError, KeyError, TypeError, OutputError):
            head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            yield head["key"], {int(line["row"]): list(map(float, line["numbers"])) for line in lines}
