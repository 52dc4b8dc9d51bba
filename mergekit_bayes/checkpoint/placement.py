"""Where an output may go: everything that can be said against a folder before any work is done for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mergekit_bayes.checkpoint.disk import disk_errors, nearest_existing
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import OutputError

LOCK_NAME = "mergekit_bayes.lock"
"""The file by which a working folder is known to be this library's own."""


def resolve_target(path: Path) -> Path:
    """The folder that `path` means, with symbolic links followed; it need not exist.

    Raises:
        OutputError: the path cannot be followed to its end, or names no folder that could be put in place.
    """
    try:
        with disk_errors(path, "follow this path"):
            target = path.resolve()
            if target.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if target.name:
                with suppress(FileNotFoundError, NotADirectoryError):
                    work_folder(target).lstat()  # the longer name may be too long
    except (RuntimeError, ValueError) as error:  # a loop of links (before Python 3.13), a zero byte
        raise OutputError(f"{shown(path)}: cannot follow this path: {error}") from error
    if not target.name:
        raise OutputError(f"{shown(path)}: the root folder cannot be an output; name a folder inside it")
    return target


def work_folder(target: Path) -> Path:
    """The folder beside `target` in which its content is prepared."""
    return target.parent / f".{target.name}.partial"


def check_placement(target: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a target that would destroy something or could not be published in the end. Touches nothing.

    Args:
        target: from `resolve_target`.
        overwrite: whether the user allowed the present content of the folder to be replaced.
        inputs: files and folders that are read.

    Raises:
        OutputError: the first reason found.
    """
    with disk_errors(target, "use as output"):
        _check_inputs(target, inputs)
        if target.exists():
            _check_existing(target, overwrite)
        _check_parent(target)
        _check_work(work_folder(target))


def is_empty(folder: Path) -> bool:
    """Whether `folder` has no entry."""
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def is_ours(work: Path) -> bool:
    """Whether an existing working folder was made by this library; an empty one is harmless to adopt."""
    if work.is_symlink() or not work.is_dir():
        return False
    lock = work / LOCK_NAME
    return is_empty(work) or (lock.is_file() and not lock.is_symlink())


def _check_existing(target: Path, overwrite: bool) -> None:
    if not target.is_dir():
        raise OutputError(f"{shown(target)}: the output must be a folder, and this is a file")
    if not is_empty(target):
        if not overwrite:
            raise OutputError(
                f"{shown(target)}: the folder exists and is not empty; choose another one, "
                "or replace everything in it with `--overwrite`"
            )
        if (target / ".git").exists():
            raise OutputError(
                f"{shown(target)}: the folder is a git repository, and replacing it would delete its "
                "history; choose another output folder"
            )
    if os.path.ismount(target):
        raise OutputError(f"{shown(target)}: a mounted disk cannot be replaced in one step; name a folder inside it")
    if _contains(target, Path.cwd()):
        raise OutputError(
            f"{shown(target)}: the output folder is put in place as a whole and cannot be the current folder "
            "or contain it; change to another folder or name another output"
        )
    if not os.access(target, os.W_OK | os.X_OK):
        raise OutputError(f"{shown(target)}: no permission to replace this folder")


def _check_inputs(target: Path, inputs: Sequence[Path]) -> None:
    for given in inputs:
        for source in _places(given):
            if _same(source, target):
                raise OutputError(f"{shown(target)}: the output folder is also an input ({shown(given)})")
            if _contains(source, target):
                raise OutputError(f"{shown(target)}: the output folder lies inside an input ({shown(given)})")
            if _contains(target, source):
                raise OutputError(
                    f"{shown(target)}: the input {shown(given)} lies inside the output folder and would be "
                    "deleted with it"
                )
            if _same(source, work_folder(target)) or _contains(work_folder(target), source):
                raise OutputError(
                    f"{shown(target)}: the input {shown(given)} is an unfinished state of this very output"
                )


def _places(given: Path) -> Iterator[Path]:
    """An input and, if it is a folder, the files that its symbolic links lead to."""
    yield given.resolve()
    if given.is_dir():
        yield from (child.resolve() for child in sorted(given.iterdir()) if child.is_symlink())


def _check_parent(target: Path) -> None:
    parent = nearest_existing(target.parent)
    if not parent.is_dir():
        raise OutputError(f"{shown(target)}: cannot be created, because {shown(parent)} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{shown(target)}: cannot be created, because {shown(parent)} cannot be written to; "
            "choose another output folder"
        )


def _check_work(work: Path) -> None:
    if os.path.lexists(work) and not is_ours(work):
        raise OutputError(
            f"{shown(work)}: this name is needed while the output is being written, and what stands there "
            "was not made by this program; move it away"
        )


def _same(left: Path, right: Path) -> bool:
    """Whether two paths lead to one thing, whatever links, mounts or letter cases they run through."""
    return left == right or (left.exists() and right.exists() and left.samefile(right))


def _contains(outer: Path, inner: Path) -> bool:
    """Whether `inner` is below `outer` or is the same folder."""
    return any(_same(outer, folder) for folder in (inner, *inner.parents))
