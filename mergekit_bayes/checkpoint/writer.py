"""Fill a safetensors file block by block, from any number of threads, and know that it is whole.

The file gets its full size before the first block, so that a full disk is met at the start. Every block goes
to its own place with one positional write; the order of blocks does not show in the bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from bisect import bisect_right
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mergekit_bayes.checkpoint.disk import create_file, disk_errors, start_writeback, sync_folder, write_all
from mergekit_bayes.checkpoint.dtypes import torch_dtype
from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.checkpoint.layout import (
    MAX_HEADER_BYTES,
    ShardLayout,
    TensorEntry,
    index_json,
    index_name,
    layout_shards,
)
from mergekit_bayes.errors import OutputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_HEADER_BYTES",
    "ShardLayout",
    "ShardWriter",
    "TensorEntry",
    "index_json",
    "index_name",
    "layout_shards",
]

_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class ShardWriter:
    """Writes one shard; a context manager that closes on success and removes the file on any exception.

    Args:
        path: the file to create; a file of that name is replaced, a symbolic link is not followed.
        layout: what the file will hold.

    Raises:
        OutputError: the file cannot be created, or there is no room for all of it.
    """

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        self.layout = layout
        self._entries = {entry.name: entry for entry in layout.entries}
        self._claimed = {entry.name: _Spans() for entry in layout.entries}
        self._written = dict.fromkeys(self._entries, 0)
        self._lock = threading.Lock()
        with disk_errors(path, "create"):
            self._descriptor: int | None = create_file(path)
        try:
            with disk_errors(path, "reserve space", needed=layout.nbytes):
                _reserve(self._descriptor, layout.nbytes)
            with disk_errors(path, "write", needed=layout.nbytes):
                write_all(self._descriptor, memoryview(layout.header), 0)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, start: int, values: torch.Tensor | bytes | memoryview) -> None:
        """Write consecutive elements of one tensor; safe to call from several threads at once.

        Args:
            name: the tensor.
            start: index of the first element written, in the flattened tensor.
            values: a one-dimensional contiguous CPU tensor of the tensor's dtype, or its bytes.

        Raises:
            OutputError: the disk refused the bytes.
            ValueError: the block does not fit the tensor, or some of it was written before.
        """
        if name not in self._entries:
            raise ValueError(f"{self.path}: no tensor is called {name}")
        entry = self._entries[name]
        data = _bytes_of(entry, values)
        first = start * entry.itemsize
        with self._lock:
            if start < 0 or first + len(data) > entry.nbytes:
                raise ValueError(f"{name}: {len(data)} bytes from byte {first} do not fit into {entry.nbytes} bytes")
            if not self._claimed[name].claim(first, first + len(data)):
                raise ValueError(f"{name}: some of bytes {first} to {first + len(data)} were written before")
        offset = len(self.layout.header) + self.layout.offsets[name] + first
        with disk_errors(self.path, "write", needed=self.layout.nbytes):
            write_all(self._open_descriptor(), data, offset)
        start_writeback(self._open_descriptor(), offset, len(data))
        with self._lock:
            self._written[name] += len(data)

    def close(self) -> None:
        """Check that every byte of every tensor was written, and make the file durable.

        Raises:
            OutputError: bytes are missing or the disk failed; the file is removed.
        """
        try:
            missing = [
                f"{entry.name} ({entry.nbytes - self._written[entry.name]} of {entry.nbytes} bytes)"
                for entry in self.layout.entries
                if self._written[entry.name] != entry.nbytes
            ]
            if missing:
                raise OutputError(f"{shown(self.path)}: not everything was written: {listed(missing)}")
            with disk_errors(self.path, "synchronise", needed=self.layout.nbytes):
                os.fsync(self._open_descriptor())
                sync_folder(self.path.parent)
        except BaseException:
            self.abort()
            raise
        self._release()

    def abort(self) -> None:
        """Give the file up and remove it; has no effect after `close`."""
        if self._descriptor is not None:
            self._release()
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"{self.path}: already closed")
        return self._descriptor

    def _release(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


class _Spans:
    """The bytes taken so far, as sorted disjoint spans: one span while blocks arrive in order."""

    def __init__(self) -> None:
        self._bounds: list[int] = []

    def claim(self, start: int, end: int) -> bool:
        """Take `[start, end)`; False, and nothing taken, if any of it was taken before."""
        if start == end:
            return True
        bounds = self._bounds
        low = high = bisect_right(bounds, start)
        if low % 2 or (low < len(bounds) and bounds[low] < end):
            return False
        joins_left = low > 0 and bounds[low - 1] == start
        joins_right = high < len(bounds) and bounds[high] == end
        bounds[low - joins_left : high + joins_right] = [start] * (not joins_left) + [end] * (not joins_right)
        return True


def _reserve(descriptor: int, nbytes: int) -> None:
    """Give the file its size, with disk blocks behind it where the file system can promise them."""
    if not hasattr(os, "posix_fallocate"):
        os.ftruncate(descriptor, nbytes)
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in _NO_PREALLOCATION:
            raise
        os.ftruncate(descriptor, nbytes)


def _bytes_of(entry: TensorEntry, values: torch.Tensor | bytes | memoryview) -> memoryview:
    """The memory of a block, without a copy, checked against the tensor it is for."""
    if isinstance(values, bytes | memoryview):
        data = memoryview(values).cast("B")
        if len(data) % entry.itemsize:
            raise ValueError(f"{entry.name}: {len(data)} bytes are no whole number of {entry.dtype} elements")
        return data
    if values.dtype != torch_dtype(entry.dtype):
        raise ValueError(f"{entry.name}: a block of {values.dtype} for a tensor of dtype {entry.dtype}")
    plain = values.is_contiguous() and not values.is_conj() and not values.is_neg()
    if values.dim() != 1 or values.device.type != "cpu" or not plain:
        raise ValueError(f"{entry.name}: a block must be a plain one-dimensional contiguous CPU tensor")
    nbytes = values.numel() * values.element_size()
    # Not through NumPy, which knows no bfloat16 and need not be installed. The caller keeps the tensor alive.
    return memoryview((ctypes.c_ubyte * nbytes).from_address(values.data_ptr()) if nbytes else b"")
