"""Where every tensor of an output goes: shards, byte offsets and headers, decided before a byte is written.

A layout is a pure function of names, dtypes, shapes and the shard limit, so equal plans give equal files.
The header of a safetensors file is written here rather than by the safetensors library because the library
orders `__metadata__` at random (two runs give two different files).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from mergekit_bayes.checkpoint.dtypes import DTYPES

MAX_HEADER_BYTES = 100_000_000
"""The longest header that readers of the format accept."""

_METADATA_KEY = "__metadata__"
_DEFAULT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


@dataclass(frozen=True)
class TensorEntry:
    """One tensor to be written.

    Args:
        name: key of the tensor in the file.
        dtype: safetensors name of the dtype, e.g. "BF16".
        shape: shape of the tensor; `()` is a scalar.

    Raises:
        ValueError: no tensor can have this name, dtype or shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name}: unknown dtype {self.dtype!r}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"{self.name}: negative size in shape {self.shape}")
        if self.name == _METADATA_KEY:
            raise ValueError(f"a tensor cannot be called {_METADATA_KEY}")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class ShardLayout:
    """One safetensors file, known to the byte except for the values.

    The data of wider dtypes comes first and the order given is kept within a width: every tensor is then
    aligned to its own element size although nothing lies between two tensors.

    Args:
        filename: name of the file, without a folder.
        entries: the tensors in the order of their data.
        metadata: strings stored under `__metadata__`, ordered by key in the file.
    """

    filename: str
    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """First byte of each tensor, counted from the start of the data."""
        offsets: dict[str, int] = {}
        position = 0
        for entry in self.entries:
            offsets[entry.name] = position
            position += entry.nbytes
        return MappingProxyType(offsets)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries)

    @cached_property
    def header(self) -> bytes:
        """The bytes before the data: length, JSON, and spaces up to a multiple of eight."""
        table: dict[str, object] = {_METADATA_KEY: dict(sorted(self.metadata.items()))}
        for entry in self.entries:
            start = self.offsets[entry.name]
            table[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.nbytes],
            }
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + self.data_bytes


def layout_shards(
    entries: Sequence[TensorEntry],
    *,
    stem: str = "model",
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> tuple[ShardLayout, ...]:
    """Distribute tensors over files, in the order given; a new file starts where the next does not fit.

    A tensor is never split: one that is larger than the limit gets a file of its own.

    Args:
        entries: the tensors; the order decides which shard each is in.
        stem: file name without its ending, e.g. "model", "adapter_model" or "precision".
        max_shard_bytes: most bytes of tensor data in one file.
        metadata: strings for each header; by default `{"format": "pt"}`, on which some loaders insist.

    Returns:
        One layout called `<stem>.safetensors`, or several called `<stem>-00001-of-0000N.safetensors`.

    Raises:
        ValueError: two tensors share a name, the limit is not positive, or a header would be too long.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    groups = _fill(entries, max_shard_bytes)
    strings = MappingProxyType(dict(_DEFAULT_METADATA if metadata is None else metadata))
    layouts = tuple(
        ShardLayout(_shard_name(stem, i, len(groups)), _widest_first(group), strings)
        for i, group in enumerate(groups, start=1)
    )
    for layout in layouts:
        if len(layout.header) - 8 > MAX_HEADER_BYTES:
            count = len(layout.entries)
            raise ValueError(f"{layout.filename}: {count} tensors need a header of more than 100 MB")
    return layouts


def index_name(stem: str = "model") -> str:
    """Name of the file that says which shard holds which tensor."""
    return f"{stem}.safetensors.index.json"


def index_json(layouts: Sequence[ShardLayout], metadata: Mapping[str, object] | None = None) -> bytes:
    """The standard index of a sharded checkpoint.

    Args:
        layouts: all shards of the checkpoint.
        metadata: further entries for the index's own `metadata`, beside `total_size` (bytes of all tensors).

    Returns:
        UTF-8 JSON with sorted keys, `{"metadata": {"total_size": ...}, "weight_map": {tensor: file}}`.
    """
    index = {
        "metadata": {**(metadata or {}), "total_size": sum(layout.data_bytes for layout in layouts)},
        "weight_map": {entry.name: layout.filename for layout in layouts for entry in layout.entries},
    }
    return (json.dumps(index, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


def _fill(entries: Sequence[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    groups: list[list[TensorEntry]] = [[]]
    names: set[str] = set()
    filled = 0
    for entry in entries:
        if entry.name in names:
            raise ValueError(f"two tensors are called {entry.name}")
        names.add(entry.name)
        if groups[-1] and filled + entry.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    return groups


def _widest_first(group: Sequence[TensorEntry]) -> tuple[TensorEntry, ...]:
    return tuple(sorted(group, key=lambda entry: -entry.itemsize))


def _shard_name(stem: str, number: int, total: int) -> str:
    return f"{stem}.safetensors" if total == 1 else f"{stem}-{number:05d}-of-{total:05d}.safetensors"
