"""The folder that gets a sidecar, beside whatever lies there: nothing else in it is touched.

Work goes on in `.precision.partial` inside it, which is kept when a run is cut short. The new files are complete before
the first of them is put in place, and a file that stands there is replaced with one rename.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mergekit_bayes.checkpoint.disk import disk_errors, make_folders, nearest_existing, require_space, sync_folder
from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.checkpoint.journal import Journal
from mergekit_bayes.checkpoint.work import WorkFolder
from mergekit_bayes.errors import (
    CheckpointError,
    DataError,
    MethodError,
    ModelError,
    NumericalError,
    OutputError,
    RecipeError,
)

__all__ = ["FIGURE_NAME", "REPORT_NAME", "SidecarFolder"]

REPORT_NAME = "precision_report.json"
FIGURE_NAME = "convergence.png"
_SIDECAR = re.compile(r"precision(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_HOPELESS = (RecipeError, CheckpointError, MethodError, NumericalError, DataError, ModelError)


class SidecarFolder:
    """Where the files of a precision pass go; a context manager around the work of the leading process.

    Args:
        target: the folder; it and its parents need not exist.
        overwrite: whether a sidecar that lies there may be replaced.
        job: identity of the work; must differ wherever what was finished would be of no use. Needed for work alone.

    Attributes:
        target: as given, with symbolic links followed.
    """

    def __init__(self, target: Path, *, overwrite: bool, job: str = "") -> None:
        with disk_errors(target, "follow this path"):
            self.target = target.resolve()
        self.overwrite = overwrite
        self.job = job
        self._work = WorkFolder(self.target / "precision")
        self._made: list[Path] = []

    @property
    def staging(self) -> Path:
        """Where files are prepared."""
        return self._work.staging

    @property
    def journal(self) -> Journal:
        """What is finished."""
        return self._work.journal

    def for_job(self, job: str) -> SidecarFolder:
        """Returns the same folder for a work of this identity."""
        return SidecarFolder(self.target, overwrite=self.overwrite, job=job)

    def check(self) -> None:
        """Refuses, without touching anything, a folder that must not or cannot be written.

        Raises:
            OutputError: it is a file, cannot be written to, or holds a sidecar that must not be replaced.
        """
        if self.target.exists() and not self.target.is_dir():
            raise OutputError(f"{shown(self.target)}: the output must be a folder, and this is a file")
        present = self._present()
        if self._work.exists():  # a run that was stopped while it put its files in place, the sidecar last
            present = [name for name in present if _SIDECAR.fullmatch(name)]
        if present and not self.overwrite:
            raise OutputError(
                f"{shown(self.target)}: holds {listed(present)}; replace the sidecar with `--overwrite`, or name "
                "another folder as output"
            )
        nearest = nearest_existing(self.target)
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise OutputError(f"{shown(self.target)}: cannot be written to; name another folder as output")

    def require_space(self, nbytes: int) -> None:
        """Refuses to start what the disk cannot hold.

        Raises:
            OutputError: fewer bytes are free.
        """
        require_space(self.target, nbytes)

    def __enter__(self) -> Self:
        self.check()
        try:
            make_folders(self.target, self._made)
            self._work.lock.acquire()
            self._work.prepare(self.job)
        except BaseException:
            self._leave(keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hopeless = isinstance(error, _HOPELESS) and not isinstance(error, OutputError)
        self._leave(keep=not hopeless)

    def publish(self, names: Sequence[str]) -> None:
        """Puts staged files in place and removes everything else.

        Args:
            names: of the files; the sidecar comes behind the others, and an index behind its shards.

        Raises:
            OutputError: the disk failed.
        """
        with disk_errors(self.target, "publish"):
            for name in self._present():
                if _SIDECAR.fullmatch(name) and name not in names:
                    (self.target / name).unlink()
            for name in names:
                (self.staging / name).replace(self.target / name)
            sync_folder(self.target)
        self._made = []
        with suppress(OSError, OutputError):  # the sidecar is complete: only rubbish is left
            self._work.remove()

    def _present(self) -> list[str]:
        if not self.target.is_dir():
            return []
        names = sorted(path.name for path in self.target.iterdir())
        return [name for name in names if _SIDECAR.fullmatch(name) or name in (REPORT_NAME, FIGURE_NAME)]

    def _leave(self, *, keep: bool) -> None:
        with suppress(OSError, OutputError):
            if self._work.lock.acquired:
                if keep and self._work.journal:
                    self._work.suspend()
                else:
                    self._work.remove()
            for folder in reversed(self._made):
                folder.rmdir()
        self._work.lock.release()
