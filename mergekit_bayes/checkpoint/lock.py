"""One writer per output: a lock file that the system releases when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from mergekit_bayes.checkpoint.disk import disk_errors
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import OutputError

_PATIENCE = 0.5
"""Seconds during which a taken lock is tried again: its holder may just be leaving."""


class FolderLock:
    """An exclusive lock on a file, creating its folder and the file where needed.

    Args:
        path: the lock file.
        what: the folder it protects, for messages.
    """

    def __init__(self, path: Path, what: Path) -> None:
        self.path = path
        self.what = what
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            OutputError: another process holds it, or the file system cannot lock.
        """
        deadline = time.monotonic() + _PATIENCE
        while not self._try():
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{shown(self.what)}: another run{self._holder()} is writing to this folder; "
                    "wait until it has finished or choose another output folder"
                )
            time.sleep(0.02)

    def release(self) -> None:
        """Let the lock go and leave its file in place."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def remove(self) -> None:
        """Delete the lock file, let the lock go and delete the folder, if it is empty."""
        self.path.unlink()
        # Before the folder: a network file system keeps a deleted file under another name while it is open.
        self.release()
        # Whoever came in between owns the folder now, and has a file in it.
        with suppress(OSError):
            self.path.parent.rmdir()

    @property
    def acquired(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def _try(self) -> bool:
        with disk_errors(self.path.parent, "create"):
            self.path.parent.mkdir(exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with disk_errors(self.path, "create"):
                descriptor = os.open(self.path, flags, 0o666)
        except OutputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False  # the previous holder has just removed the folder
            raise
        try:
            with disk_errors(self.path, "lock"):
                mine = _lock_at_once(descriptor) and self._is_still(descriptor)
                if mine:
                    _sign(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if mine:
            self._descriptor = descriptor
        else:
            os.close(descriptor)
        return mine

    def _is_still(self, descriptor: int) -> bool:
        """Whether the locked file is the one that has the name: its last holder may have removed that one."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        # Only a hint: the holder may not have signed yet.
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(self.path.read_text())
            return f" (process {int(holder['process'])} on {shown(str(holder['host']))})"
        return ""


def _sign(descriptor: int) -> None:
    # Only a help for whoever finds the lock taken: a full disk is reported where it matters.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        holder = {"process": os.getpid(), "host": socket.gethostname()}
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _lock_at_once(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
