"""The folder in which an output is prepared, and the few renames that put it in place.

It stands beside the target, so that a rename can publish it, and is called `.<name>.partial`:

    mergekit_bayes.lock   locked while a process works here; also marks the folder as ours
    job                   which work this is; anything begun for another one is thrown away
    journal/              one small file per finished item
    staging/              the files as they will be published
    replaced/             the former content of the target, while it is being replaced
    discarded/            former content that only waits to be deleted

Where the target is absent or empty, one atomic rename publishes the staging folder. Where it is replaced,
there are two: the target to `replaced`, then `staging` to the target. A machine that stops between the two
leaves no target and the complete former one in `replaced`; `recover` puts it back, and deletes it only once
the new content stands in its place.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from mergekit_bayes.checkpoint.disk import disk_errors, sync_folder, sync_tree, write_atomically
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.journal import Journal
from mergekit_bayes.checkpoint.lock import FolderLock
from mergekit_bayes.checkpoint.placement import LOCK_NAME, is_empty, is_ours, work_folder
from mergekit_bayes.errors import OutputError


class WorkFolder:
    """What happens beside a target; everything but `exists` needs the lock.

    Args:
        target: from `placement.resolve_target`.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = work_folder(target)
        self.staging = self.path / "staging"
        self.journal = Journal(self.path / "journal", self.staging)
        self.lock = FolderLock(self.path / LOCK_NAME, target)
        self._job = self.path / "job"
        self._replaced = self.path / "replaced"
        self._discarded = self.path / "discarded"

    def exists(self) -> bool:
        """Whether there is one from an earlier or a present run."""
        return os.path.lexists(self.path) and is_ours(self.path)

    def recover(self) -> None:
        """Finish or undo an interrupted publication: the target is complete afterwards, or was never there.

        Raises:
            OutputError: the disk failed, or something else has taken the place of the former content.
        """
        with disk_errors(self.path, "finish an interrupted publication"):
            _delete(self._discarded)
            if not self._replaced.exists():
                return
            published = not self.staging.exists()
            if not self.target.exists() or (is_empty(self.target) and not published):
                self._replaced.rename(self.target)
                sync_folder(self.target.parent)
            elif not published:
                raise OutputError(
                    f"{shown(self._replaced)}: holds the former content of {shown(self.target)}, where "
                    "something else has appeared since; move one of the two away"
                )
            else:
                # Renamed first: a half-deleted folder must never be taken for something to put back.
                self._replaced.rename(self._discarded)
                _delete(self._discarded)

    def prepare(self, job: str) -> None:
        """Make an empty staging folder, or keep what an interrupted run of the same job had finished.

        Raises:
            OutputError: the disk failed.
        """
        with disk_errors(self.path, "prepare"):
            if self._holds(job):
                self._delete_unfinished()
            else:
                # The name of the job goes first and comes last: without it nothing here is trusted.
                self._job.unlink(missing_ok=True)
                _delete(self.journal.folder)
                _delete(self.staging)
                self.journal.folder.mkdir()
                self.staging.mkdir()
                write_atomically(self._job, job.encode())

    def publish(self, *, overwrite: bool) -> None:
        """Put the staging folder in place of the target.

        Args:
            overwrite: whether a target that is not empty may be replaced.

        Raises:
            OSError: nothing was published; the target is as it was, or will be after `recover`.
        """
        sync_tree(self.staging)
        if self.target.exists():
            # A folder that its owner had closed to others stays closed.
            self.staging.chmod(stat.S_IMODE(self.target.stat().st_mode))
            if overwrite and not is_empty(self.target):
                self.target.rename(self._replaced)
        self.staging.rename(self.target)
        sync_folder(self.target.parent)
        sync_folder(self.path)

    def suspend(self) -> None:
        """Leave everything for a later run and let the lock go."""
        self.lock.release()

    def remove(self) -> None:
        """Delete everything here, once nothing needs to be recovered, and let the lock go.

        Raises:
            OSError: something cannot be deleted; the next run will try again.
            OutputError: as `recover`.
        """
        try:
            self.recover()
            # Everything, not only what has a name here: a killed run may have left a half-written file.
            for path in sorted(self.path.iterdir()):
                if path != self.lock.path:
                    _delete(path)
            self.lock.remove()
            sync_folder(self.target.parent)
        finally:
            self.lock.release()

    def _holds(self, job: str) -> bool:
        return self.staging.is_dir() and self._job.is_file() and self._job.read_text() == job

    def _delete_unfinished(self) -> None:
        finished = self.journal.files()
        for root, _, names in os.walk(self.staging):
            for path in (Path(root) / name for name in names):
                if path not in finished:
                    path.unlink()


def _delete(path: Path) -> None:
    """Remove a file, or a folder and all in it, if it is there; symbolic links are removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
