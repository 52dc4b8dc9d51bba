"""The header of one safetensors file: what tensors it holds, their types and shapes, and where they lie.

The format is eight bytes (little-endian length), a JSON object, then the tensors back to back. The parser
here is stricter than the format's reference implementation, which lets duplicate keys through (the last one
wins): a file is read only if there is exactly one way to read it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from mergekit_bayes.checkpoint.dtypes import DTYPES, PACKED_DTYPES
from mergekit_bayes.checkpoint.files import brief, open_regular, parse_json_object, read_exactly, shown
from mergekit_bayes.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the JSON part."""

_LENGTH_BYTES = 8
_MAX_ELEMENTS = 2**63 - 1  # sizes are 64-bit signed integers everywhere downstream
_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_GIT_LFS_POINTER = b"version "
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in a file: what it is and which bytes hold it.

    Attributes:
        name: its key; may contain any character, so it is never a file name and is printed through
            `files.shown`.
        dtype: a key of `DTYPES`.
        shape: sizes, row-major; `()` is a single number.
        path: the file.
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // DTYPES[self.dtype].itemsize

    @property
    def floating(self) -> bool:
        """Whether it is merged by arithmetic, see `DTypeInfo`."""
        return DTYPES[self.dtype].floating


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file.

    Attributes:
        path: the file.
        metadata: its free strings.
        tensors: its tensors by name, in the order of their bytes.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file; the tensors themselves are not read.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is not a safetensors file, or something about its header is inconsistent:
            length, encoding, JSON, duplicate keys, types, shapes, offsets, holes, overlaps, missing or
            trailing bytes.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        raw_length = read_exactly(path, descriptor, min(size, _LENGTH_BYTES), 0)
        length = _header_length(path, raw_length, size)
        raw = read_exactly(path, descriptor, length, _LENGTH_BYTES)
    finally:
        os.close(descriptor)
    fields = parse_json_object(raw, f"{shown(path)}: its header")
    metadata = _checked_metadata(path, fields.pop(_METADATA, {}))
    start = _LENGTH_BYTES + length
    tensors = [_checked_tensor(path, name, value, start) for name, value in fields.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_tiling(path, tensors, start, size)
    return Header(path, metadata, MappingProxyType({info.name: info for info in tensors}))


def element_count(shape: Sequence[int]) -> int:
    """Returns the number of elements of a shape.

    Raises:
        CheckpointError: some partial product does not fit 64 bits, even if a later size is 0.
    """
    count = 1
    for size in shape:
        count *= size
        if count > _MAX_ELEMENTS or size > _MAX_ELEMENTS:
            raise CheckpointError(f"shape {brief(list(shape))} has more elements than 64 bits can count")
    return count


def _header_length(path: Path, raw: bytes, size: int) -> int:
    if size < _LENGTH_BYTES:
        _refuse(path, f"has {size} bytes; a safetensors file has at least {_LENGTH_BYTES}")
    length = int.from_bytes(raw, "little")
    if length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        _refuse_length(path, raw, length, size)
    return length


def _refuse_length(path: Path, raw: bytes, length: int, size: int) -> NoReturn:
    if raw == _GIT_LFS_POINTER:
        _refuse(path, "is a Git LFS pointer, not the tensors themselves; fetch them with `git lfs pull`")
    if raw.startswith(_PICKLES):
        _refuse(path, "looks like a pickle, which can run code when loaded; expected a safetensors file")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"claims a header of {length} bytes; the format allows at most {MAX_HEADER_BYTES}")
    _refuse(path, f"claims a header of {length} bytes but has only {size} bytes; it is truncated or damaged")


def _checked_metadata(path: Path, value: object) -> Mapping[str, str]:
    if not isinstance(value, dict):
        _refuse(path, f"its {_METADATA} is {brief(value)}; expected an object of strings")
    for key, text in value.items():
        if not isinstance(text, str):
            _refuse(path, f"its {_METADATA} holds {brief(text)} under {shown(key)}; expected a string")
        _check_characters(path, key)
        _check_characters(path, text)
    return MappingProxyType(value)


def _checked_tensor(path: Path, name: str, value: object, start: int) -> TensorInfo:
    _check_characters(path, name)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        _refuse(path, f"is described by {brief(value)}; expected exactly {', '.join(sorted(_FIELDS))}", name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse_dtype(path, name, dtype)
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        _refuse(path, f"its shape is {brief(shape)}; expected a list of whole numbers >= 0", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(edge) is int for edge in offsets):
        _refuse(path, f"its data_offsets are {brief(offsets)}; expected two whole numbers", name)
    try:
        nbytes = element_count(shape) * DTYPES[dtype].itemsize
    except CheckpointError as error:
        _refuse(path, str(error), name)
    begin, end = offsets
    if begin < 0 or end - begin != nbytes:
        seen = f"its data_offsets {brief(offsets)} span {end - begin} bytes"
        _refuse(path, f"{seen}; expected {nbytes} for {dtype} of shape {brief(shape)}", name)
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, nbytes)


def _check_tiling(path: Path, tensors: Sequence[TensorInfo], start: int, size: int) -> None:
    expected = start
    for info in tensors:
        if info.offset != expected:
            what = "overlaps the tensor before it" if info.offset < expected else "leaves a hole before it"
            _refuse(path, f"starts at byte {info.offset} and {what}; expected byte {expected}", info.name)
        expected += info.nbytes
    if expected > size:
        _refuse(path, f"ends at byte {expected} but the file has {size}; it is truncated", tensors[-1].name)
    if expected < size:
        _refuse(path, f"has {size} bytes; expected {expected}: the last {size - expected} belong to no tensor")


def _check_characters(path: Path, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        _refuse(path, f"its header contains {shown(text)}, which holds half a character (a lone surrogate)")


def _refuse_dtype(path: Path, name: str, dtype: object) -> NoReturn:
    if isinstance(dtype, str) and dtype in PACKED_DTYPES:
        advice = "convert the checkpoint to bfloat16 first"
        _refuse(path, f"dtype {dtype} packs several values into one byte and is not supported; {advice}", name)
    _refuse(path, f"its dtype is {brief(dtype)}; expected one of {', '.join(DTYPES)}", name)


def _refuse(path: Path, message: str, name: str | None = None) -> NoReturn:
    where = shown(path) if name is None else f"{shown(path)}: tensor {shown(name)}"
    raise CheckpointError(f"{where}: {message}")
