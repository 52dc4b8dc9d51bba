"""What the disk says, in the words of this library: durable files, free space, readable system errors."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import OutputError

_REMEDY = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "the disk quota is used up: free some space or write to another disk",
    errno.EFBIG: "the file is larger than the file system or the process limit (`ulimit -f`) allows: "
    "lower `output.max_shard_size` or raise the limit",
    errno.EIO: "the device reported a fault: check it before trying again",
    errno.EROFS: "the file system is mounted read-only: choose another output folder",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the path runs through a loop of symbolic links",
}


def format_bytes(count: int) -> str:
    """A byte count for people and for arithmetic, e.g. `2,500,000 bytes (2.5 MB)`."""
    value, unit = float(count), ""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if abs(value) < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{count:,} bytes" if unit == "bytes" else f"{count:,} bytes ({value:.1f} {unit})"


def free_bytes(path: Path) -> int:
    """Bytes an ordinary process may still write on the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(path)).free


def nearest_existing(path: Path) -> Path:
    """`path` itself, or the closest ancestor of it that exists."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow a symbolic link
    return next((p for p in (absolute, *absolute.parents) if p.exists()), Path(absolute.anchor))


def require_space(path: Path, nbytes: int) -> None:
    """Refuses to start what a disk cannot hold.

    Args:
        path: what will be written, or its folder; it need not exist yet.
        nbytes: bytes still to be written.

    Raises:
        OutputError: fewer bytes are free.
    """
    with disk_errors(path, "measure free space"):
        free = free_bytes(path)
    if nbytes > free:
        raise OutputError(
            f"{shown(path)}: {format_bytes(nbytes)} needed, {format_bytes(free)} free on the disk of "
            f"{shown(nearest_existing(path))}; free some space or write to another disk"
        )


def make_folders(path: Path, made: list[Path]) -> None:
    """Makes a folder and those above it that are missing.

    Args:
        path: the folder.
        made: gets those that were not there, outermost first, also where a later one fails.

    Raises:
        OutputError: the disk failed.
    """
    with disk_errors(path, "create"):
        for folder in reversed((path, *path.parents)):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)


def output_error(error: OSError, path: Path, action: str, *, needed: int | None = None) -> OutputError:
    """The `OutputError` that says which file failed, why, how many bytes were needed, and what to do.

    Args:
        error: what the system call raised.
        path: the file or folder it was about.
        action: what was being done to it, e.g. "write".
        needed: size in bytes the file was to have, where that matters.
    """
    parts = [f"{shown(path)}: cannot {action}: {error.strerror or error}"]
    if needed is not None:
        parts.append(f"{format_bytes(needed)} needed")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            parts.append(f"{format_bytes(free_bytes(path))} free")
    remedy = _REMEDY.get(error.errno or 0)
    return OutputError("; ".join(parts + ([remedy] if remedy else [])))


@contextmanager
def disk_errors(path: Path, action: str, *, needed: int | None = None) -> Iterator[None]:
    """Turn every `OSError` raised inside the block into an `OutputError` about `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(error, path, action, needed=needed) from error


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is atomic, but survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot synchronise a folder and say so; the files themselves are safe.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file and name below `folder` durable, itself last; symbolic links are not followed."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in sorted(files):
            if not (Path(root) / name).is_symlink():
                sync_file(Path(root) / name)
        sync_folder(Path(root))


def create_file(path: Path) -> int:
    """Open a new file and return its descriptor, replacing (never writing through) what has its name.

    The mode is 0o666 less the umask, applied by the kernel: reading the umask would have to change it for a
    moment, for every thread of the process.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of an open file; one call may be cut short, at 2 GiB or by a signal."""
    done = 0
    while done < len(data):
        written = os.pwrite(descriptor, data[done:], offset + done)
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        done += written


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the system to send bytes that were just written on their way to the disk, without waiting for them.

    The disk then works while the next block is computed, and the final fsync finds little left to do. Advice only: a
    system that lacks the call, or a file system that refuses it, changes nothing; faults of the disk are reported
    by fsync.
    """
    call = _sync_file_range()
    if call is not None:
        call(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    call: Callable[[int, int, int, int], int] | None = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]  # type: ignore[attr-defined]
    return call


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`; a crash at any moment leaves the old bytes or the new ones.

    Raises:
        OutputError: the file cannot be written; what stood at `path` is untouched.
    """
    with disk_errors(path, "write", needed=len(data)):
        fresh = path.with_name(f".{path.name[:32]}.{os.getpid()}.{threading.get_ident()}.new")
        try:
            descriptor = create_file(fresh)
            try:
                write_all(descriptor, memoryview(data), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            fresh.replace(path)
            sync_folder(path.parent)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
