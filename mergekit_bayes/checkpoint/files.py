"""One file of a checkpoint: opening it, reading its JSON, and naming what is in it.

Folders come from strangers. A file may be a pipe, a link out of its folder, a million nested lists, or
carry names made of control characters; nothing here waits, follows, recurses or prints without a limit.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mergekit_bayes.errors import CheckpointError

_SHOWN_CHARACTERS = 200
_LONGEST_NUMBER = 30  # more digits than any 64-bit number; int() alone is quadratic in their count
_MAX_JSON_BYTES = 100_000_000

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxlong, _BRIEF.maxlist, _BRIEF.maxdict = 2, 100, 40, 8, 8


def shown(text: str | Path) -> str:
    """Returns a tensor name, path or other outside text as it may stand in a message: escaped and cut."""
    text = str(text)
    safe = text if text.isprintable() else repr(text)
    if len(safe) <= _SHOWN_CHARACTERS:
        return safe
    return f"{safe[:_SHOWN_CHARACTERS]}... ({len(text)} characters)"


def brief(value: object) -> str:
    """Returns a short form of a parsed value for a message, however large or deep the value is."""
    text = _BRIEF.repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Returns names for a message, escaped and separated by commas; beyond `limit`, their count."""
    text = ", ".join(map(shown, names[:limit]))
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def contained(folder: Path, name: str) -> Path:
    """Returns the path of a file of a folder, given a name that the folder's own JSON may have chosen.

    A link is followed only if it stays in the folder or leads into the store of the hub's cache, whose
    folders consist of such links.

    Raises:
        CheckpointError: the name is not a plain file name, or the link leads elsewhere.
    """
    if not _is_file_name(name):
        raise CheckpointError(f"{shown(folder)}: names the file {shown(name)}; expected a file in this folder")
    path = folder / name
    target = Path(os.path.realpath(path))
    inside = target.is_relative_to(os.path.realpath(folder))
    if path.is_symlink() and not inside and not _in_hub_store(target):
        leaves = f"{shown(path)}: is a link that leaves its folder, to {shown(target)}"
        raise CheckpointError(f"{leaves}; replace it by a copy of that file")
    return path


def open_regular(path: Path) -> int:
    """Opens a regular file for reading and returns its descriptor; pipes, devices and folders are refused.

    Raises:
        CheckpointError: it cannot be opened, or is not a regular file.
    """
    try:
        # O_NONBLOCK: a pipe somebody left in the folder must fail, not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{shown(path)}: cannot be opened: {reason}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a folder"
        raise CheckpointError(f"{shown(path)}: is {kind}; expected a file")
    return descriptor


def read_exactly(path: Path, descriptor: int, length: int, offset: int) -> bytes:
    """Reads `length` bytes at `offset`.

    Raises:
        CheckpointError: the file ends earlier, which it did not when its size was taken.
    """
    pieces: list[bytes] = []
    while length:
        piece = os.pread(descriptor, length, offset)
        if not piece:
            raise CheckpointError(f"{shown(path)}: changed while reading: {length} bytes missing at {offset}")
        pieces.append(piece)
        length -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def load_json(text: str) -> object:
    """Parses JSON that has exactly one meaning: duplicate keys and absurd nesting or numbers are refused.

    Raises:
        ValueError: with the reason; the caller knows the file.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_without_duplicates, parse_int=_whole_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, object]:
    """Reads a JSON file that holds one object, such as `config.json` or an index of shards.

    Raises:
        CheckpointError: it cannot be opened, is too large, or is not one unambiguous JSON object.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{shown(path)}: has {size} bytes; expected JSON of at most {_MAX_JSON_BYTES}")
        raw = read_exactly(path, descriptor, size, 0)
    finally:
        os.close(descriptor)
    return parse_json_object(raw, f"{shown(path)}:")


def parse_json_object(raw: bytes, where: str) -> dict[str, object]:
    """Parses bytes that must be one JSON object.

    Args:
        raw: the bytes.
        where: how messages begin, such as `config.json:`.

    Raises:
        CheckpointError: they are not UTF-8, not JSON, ambiguous, or not an object.
    """
    try:
        value = load_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {brief(value)}; expected a JSON object")
    return value


def _is_file_name(name: str) -> bool:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < length <= 255 and name not in (".", "..") and not any(mark in name for mark in "/\\\0")


def _in_hub_store(target: Path) -> bool:
    # <cache>/models--<org>--<name>/blobs/<etag>, or the store shared by all repositories:
    # <cache>/blobs/<xx>/<hash>
    store = target.parent
    if store.name == "blobs":
        return store.parent.name.startswith("models--")
    return store.parent.name == "blobs" and len(store.name) == 2 and target.name.startswith(store.name)


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} appears twice")
    return result


def _whole_number(text: str) -> int | float:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return -0.0 if text == "-0" else int(text)  # -0 is a float to the format's reference parser, so not a size
