"""Safetensors files and model folders built byte by byte, good and bad."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def raw_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file with this header (JSON-able, or the very bytes), claiming `length` bytes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def field(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(
    folder: Path,
    header: object,
    data: bytes = b"",
    *,
    length: int | None = None,
    name: str = "bad.safetensors",
) -> Path:
    """Writes such bytes and returns the file."""
    path = folder / name
    path.write_bytes(raw_bytes(header, data, length=length))
    return path


def write_folder(
    parent: Path,
    files: Mapping[str, list[str]],
    *,
    index: Mapping[str, object] | str | None = None,
    config: str | None = "{}",
    stem: str = "model",
    name: str = "folder",
) -> Path:
    """Writes a model folder in which every tensor is float32 of shape (2,), and returns it.

    Args:
        parent: where the folder is made.
        files: the tensor names in each file; equal names in two files get different values.
        index: a weight map, completed to an index that is right about sizes, or the text of an index file.
        config: text of config.json; None for none.
        stem: stem of the index's file name.
        name: the folder's name.
    """
    folder = parent / name
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    for number, (file, tensors) in enumerate(files.items()):
        header = {tensor: field("F32", [2], 8 * i, 8 * i + 8) for i, tensor in enumerate(tensors)}
        values = b"".join(f"{number:03d}{tensor:>5.5}".encode()[:8].ljust(8) for tensor in tensors)
        (folder / file).write_bytes(raw_bytes(header, values))
    if index is not None:
        whole = {"metadata": {"total_size": 8 * sum(map(len, files.values()))}, "weight_map": index}
        text = index if isinstance(index, str) else json.dumps(whole)
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return folder
