"""One output folder: refused before any work or published whole, whatever happens in between."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mergekit_bayes.checkpoint.disk import disk_errors, make_folders, require_space
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.journal import Record
from mergekit_bayes.checkpoint.placement import check_placement, resolve_target
from mergekit_bayes.checkpoint.work import WorkFolder
from mergekit_bayes.errors import CheckpointError, MethodError, NumericalError, OutputError, RecipeError

_HOPELESS = (RecipeError, CheckpointError, MethodError, NumericalError)


class OutputFolder:
    """The folder a merge or a training run writes to; a context manager around the work.

    Files are written to `staging`, beside the target; `publish` puts them in place with a rename. Leaving the
    context without it keeps what was finished, so that the same job can continue later. Only an error that
    the same job would meet again, an unreadable input or illegal numbers, throws it away, and not even that if
    what was finished is `precious`.

    Several processes may share one output: the leader alone locks, clears and publishes; the others write
    to `staging` and see what is `finished`, once the leader has entered the context and told them so.

    Args:
        path: the folder to publish; it and its parents need not exist, symbolic links are followed.
        overwrite: whether everything in a folder that is not empty may be replaced.
        inputs: files and folders the merge reads; the output may neither contain nor lie inside one.
        job: identity of the work; must differ wherever what was finished would be of no use.
        leader: whether this process is the one that prepares and publishes.
        precious: keep what was finished after every error: hours of training, not seconds of arithmetic.

    Raises:
        OutputError: the path can never be an output folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool,
        inputs: Sequence[Path],
        job: str,
        leader: bool = True,
        precious: bool = False,
    ) -> None:
        self.target = resolve_target(path)
        self.overwrite = overwrite
        self.inputs = tuple(inputs)
        self.job = job
        self.leader = leader
        self.precious = precious
        self._work = WorkFolder(self.target)
        self._made: list[Path] = []

    @property
    def staging(self) -> Path:
        """The folder whose files will be published; it exists inside the context."""
        return self._work.staging

    def check(self) -> None:
        """Refuse, before any work and without touching anything, a folder that must not or cannot be written.

        Raises:
            OutputError: it is a file, not empty (unless `overwrite`), a mounted disk, a git repository or the
                current folder; it is, contains or lies inside an input; its parent cannot be written to; or
                something that is not ours stands where the working folder goes.
        """
        check_placement(self.target, overwrite=self.overwrite, inputs=self.inputs)

    def recover(self) -> None:
        """Finish or undo a publication of any earlier job that was interrupted; nothing to do is fine.

        Entering the context does this too. Called before `check`, it spares a user whose machine stopped
        while an old output was being replaced from seeing neither.

        Raises:
            OutputError: another process is working there, or the disk failed.
        """
        if not self._work.exists():
            return
        self._work.lock.acquire()
        try:
            self._work.recover()
            if not self._work.staging.exists():
                with disk_errors(self._work.path, "remove"):
                    self._work.remove()
        finally:
            self._work.lock.release()

    def require_space(self, nbytes: int) -> None:
        """Refuse to start what the disk cannot hold; inside the context, where stale files are gone.

        Args:
            nbytes: bytes still to be written, without those of finished items.

        Raises:
            OutputError: fewer bytes are free.
        """
        require_space(self.target, nbytes)

    def __enter__(self) -> Self:
        if not self.leader:
            return self
        self.recover()
        self.check()
        try:
            make_folders(self.target.parent, self._made)
            self._work.lock.acquire()
            self._work.recover()
            self.check()
            self._work.prepare(self.job)
        except BaseException:
            self._leave(keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hopeless = isinstance(error, _HOPELESS) and not isinstance(error, OutputError)
        self._leave(keep=self.precious or not hopeless)

    def finished(self, item: str) -> Record | None:
        """What `finish` was told about `item`, by any process in any run of this job; None if not done."""
        return self._work.journal.get(item)

    def finish(self, item: str, record: Record, *, files: Sequence[str] | None = None) -> None:
        """Remember for good that `item` is done; a later run of the same job need not repeat it.

        Args:
            item: any name; usually that of a file in the staging folder.
            record: what `finished` shall return; anything JSON can hold.
            files: names of the item's files in the staging folder, by default the one called `item`, if there
                is one. When an interrupted job continues, files of no finished item are deleted.

        Raises:
            OutputError: a file is missing or the disk failed.
        """
        if files is None:
            files = (item,) if (self.staging / item).is_file() else ()
        self._work.journal.add(item, record, files)

    def forget(self, item: str) -> None:
        """Delete a finished item and its files; one that was never finished is fine.

        Raises:
            OutputError: the disk failed.
        """
        self._work.journal.remove(item)

    def publish(self) -> None:
        """Put the staged files in place, as the only content of the target, and remove the working folder.

        Raises:
            OutputError: the disk failed, or the target is no longer what it was when checked; everything
                staged is kept for another try.
        """
        if not self._work.lock.acquired:
            raise ValueError("only the leader can publish, once, and inside the context")
        with disk_errors(self.target, "publish"):
            self._work.publish(overwrite=self.overwrite)
        try:
            self._work.remove()
        except (OSError, OutputError) as error:
            # The output is complete: only rubbish is left, and the next run to this folder removes it.
            warnings.warn(f"{shown(self._work.path)} cannot be removed: {error}", stacklevel=2)

    def _leave(self, *, keep: bool) -> None:
        """Let the working folder go, kept only if there is something in it worth continuing from."""
        # What cannot be deleted now is deleted by the next run; an error that led here matters more.
        with suppress(OSError, OutputError):
            if self._work.lock.acquired:
                self._work.recover()
                if keep and self._work.journal:
                    self._work.suspend()
                else:
                    self._work.remove()
            for folder in reversed(self._made):
                folder.rmdir()
        self._work.lock.release()
