"""Blocks of tensors from disk, read where they lie.

Positional reads and no memory map: a file that shrinks while it is mapped kills the process with SIGBUS,
where a short read is an error with a message; and resident memory is the blocks in use, not the files read
so far.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mergekit_bayes.checkpoint.dtypes import DTYPES, torch_dtype
from mergekit_bayes.checkpoint.files import open_regular, shown
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_Identity = tuple[int, int, int, int]


@dataclass
class _OpenFile:
    descriptor: int
    readers: int = 0


class BlockReader:
    """Reads blocks of tensors; safe to use from several threads; a context manager that closes its files.

    A file is opened at its first block and stays open while few are. Should it be replaced or rewritten
    between two openings, the next read from it is refused.

    Args:
        max_open: files kept open at once; more only while that many threads read different files at one
            moment.
    """

    def __init__(self, *, max_open: int = 64) -> None:
        if sys.byteorder != "little":
            raise CheckpointError("this machine is big-endian; safetensors files hold little-endian numbers")
        self._max_open = max_open
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._identities: dict[Path, _Identity] = {}
        self._closed = False

    def read_block(self, info: TensorInfo, start: int, count: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Reads consecutive elements of the flattened tensor.

        Args:
            info: the tensor.
            start: index of the first element.
            count: number of elements.
            out: a contiguous CPU tensor of the same type with at least `count` elements, to be filled from
                its start and reused; a new tensor if not given.

        Returns:
            A one-dimensional tensor of `count` elements in the stored type; a view of `out` if given.

        Raises:
            CheckpointError: the file is gone, was replaced, or ends early.
            ValueError: the block lies outside the tensor, or `out` does not fit.
        """
        import torch  # here only: plans use the modules around this one without torch

        if start < 0 or count < 0 or start + count > info.numel:
            raise ValueError(f"elements {start} to {start + count} of {shown(info.name)}, which has {info.numel}")
        dtype = torch_dtype(info.dtype)
        if out is None:
            out = torch.empty(count, dtype=dtype)
        elif out.dtype != dtype or out.device.type != "cpu" or not out.is_contiguous() or out.numel() < count:
            raise ValueError(f"out must be a contiguous CPU tensor of {count} elements of {dtype}, not {out.dtype}")
        itemsize = DTYPES[info.dtype].itemsize
        if count:
            # through ctypes and not NumPy, which knows no bfloat16 and need not be installed
            memory = memoryview((ctypes.c_ubyte * (count * itemsize)).from_address(out.data_ptr())).cast("B")
            self._fill(info, memory, info.offset + start * itemsize)
        return out.view(-1)[:count]

    def read_tensor(self, info: TensorInfo) -> torch.Tensor:
        """Reads a whole tensor in its shape and stored type.

        Raises:
            CheckpointError: the file is gone, was replaced, or ends early.
        """
        return self.read_block(info, 0, info.numel).reshape(info.shape)

    def close(self) -> None:
        """Closes every file; reads in other threads must have ended."""
        with self._lock:
            self._closed = True
            for file in self._files.values():
                os.close(file.descriptor)
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, info: TensorInfo, memory: memoryview, offset: int) -> None:
        done = 0
        with self._borrowed(info.path) as descriptor:
            while done < len(memory):
                try:
                    count = os.preadv(descriptor, [memory[done:]], offset + done)  # at most 2 GiB a call
                except OSError as error:
                    where = f"{shown(info.path)}: tensor {shown(info.name)}"
                    raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error
                if count == 0:
                    seen = f"the file ends at byte {offset + done}; expected {len(memory) - done} bytes more"
                    raise CheckpointError(f"{_changed(info.path)}: tensor {shown(info.name)}: {seen}")
                done += count

    @contextmanager
    def _borrowed(self, path: Path) -> Iterator[int]:
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = self._open(path)
            self._files.move_to_end(path)
            file.readers += 1
            self._close_surplus()
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.readers -= 1

    def _open(self, path: Path) -> _OpenFile:
        descriptor = open_regular(path)
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._identities.setdefault(path, identity) != identity:
            os.close(descriptor)
            raise CheckpointError(f"{_changed(path)}: it was replaced or rewritten since it was first opened")
        return _OpenFile(descriptor)

    def _close_surplus(self) -> None:
        idle = [path for path, file in self._files.items() if file.readers == 0]
        for path in idle[: max(0, len(self._files) - self._max_open)]:
            os.close(self._files.pop(path).descriptor)


def _changed(path: Path) -> str:
    return f"{shown(path)}: changed while reading"
