"""Checkpoints of the output folder: written, counted, and thrown away when newer ones are safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.errors import OutputError
from mergekit_bayes.finetune.checkpoints import (
    Checkpoint,
    find_checkpoints,
    name_of,
    newest_whole,
    write_checkpoint,
)
from mergekit_bayes.finetune.tensors import bytes_of

__all__ = ["FOLDER", "Saver"]

FOLDER = "checkpoints"
"""Where checkpoints are, inside the output folder."""


@dataclass(frozen=True)
class Saver:
    """Keeps the checkpoints of one output.

    Attributes:
        output: of the run; its leader's.
        limit: how many are kept; None for all.
    """

    output: OutputFolder
    limit: int | None = None

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints, as long as the run lasts."""
        return self.output.staging / FOLDER

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Returns the newest checkpoint of an interrupted run that is whole, and what is wrong with newer ones."""
        return newest_whole(self.folder)

    def has(self, step: int) -> bool:
        """Whether the checkpoint of a step is there."""
        return self.output.finished(name_of(step)) is not None

    def save(self, capture: Callable[[], Checkpoint], step: int) -> Path:
        """Writes the checkpoint of a step, unless it is there, and deletes the oldest beyond the limit.

        Args:
            capture: makes it.
            step: optimizer steps taken.

        Returns:
            Its folder.

        Raises:
            OutputError: the disk has no room or failed; the checkpoints before are as they were.
        """
        path = self.folder / name_of(step)
        if not self.has(step):
            checkpoint = capture()
            try:
                self.output.require_space(_size(checkpoint))
                files = write_checkpoint(self.folder, checkpoint)
                names = [file.relative_to(self.output.staging).as_posix() for file in files]
                self.output.finish(path.name, {"step": step}, files=names)
            except OutputError as error:
                raise OutputError(f"{error}\n{self._what_is_left(step)}") from error
        self._thin()
        return path

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints of later steps than `step`: the run takes another way from there."""
        for found, path in find_checkpoints(self.folder):
            if found > step:
                self.output.forget(path.name)

    def _thin(self) -> None:
        kept = find_checkpoints(self.folder)
        for _, path in kept[: -self.limit] if self.limit else ():
            self.output.forget(path.name)

    def _what_is_left(self, step: int) -> str:
        found = find_checkpoints(self.folder)
        stopped = f"the run stopped after step {step}, whose checkpoint could not be written"
        if not found:
            return f"{stopped}; there is none before it: the same command begins anew"
        return f"{stopped}; {found[-1][1].name} is whole: the same command continues from it"


def _size(checkpoint: Checkpoint) -> int:
    state = checkpoint.optimizer["state"].values()
    tensors = {str(id(value)): value for entry in state for value in entry.values() if hasattr(value, "element_size")}
    return bytes_of(checkpoint.trainable) + bytes_of(tensors) + len(checkpoint.log) + (1 << 20)
