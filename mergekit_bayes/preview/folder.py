"""The folder of a preview: filled as the sweep goes on, so that whatever ends it leaves what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.disk import disk_errors
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.lock import FolderLock
from mergekit_bayes.errors import OutputError, RecipeError
from mergekit_bayes.preview.cache import EvaluationCache
from mergekit_bayes.recipe import dump_yaml

__all__ = ["FRONT_NAME", "RECIPE_NAME", "PreviewFolder", "read_front"]

FRONT_NAME = "front.json"
RECIPE_NAME = "preview_recipe.yaml"
_LOCK = ".preview.lock"


class PreviewFolder:
    """An output folder that is made, or continued, in place.

    Args:
        path: the folder.
        overwrite: forget what an earlier preview evaluated there.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self.path, self._overwrite = path, overwrite

    def check(self) -> None:
        """Refuses a place that is no folder of a preview.

        Raises:
            OutputError: it is a file, or a folder with something else in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{shown(self.path)}: is a file; expected a folder to write the preview to")
        others = [each.name for each in self.path.iterdir() if each.name != _LOCK] if self.path.is_dir() else []
        if others and RECIPE_NAME not in others:
            raise OutputError(
                f"{shown(self.path)}: holds {shown(sorted(others)[0])} and no preview; choose an empty folder, or "
                "that of an earlier preview, which is then continued"
            )

    @contextmanager
    def held(self, recipe: Mapping[str, Any]) -> Iterator[None]:
        """Nobody else writes here inside; the resolved recipe is there from the start.

        Raises:
            OutputError: another process is writing here, or the disk failed.
        """
        self.check()
        with disk_errors(self.path, "create"):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.path / _LOCK, self.path)
        lock.acquire()
        try:
            if self._overwrite:
                EvaluationCache(self.path).clear()
            self.write(RECIPE_NAME, dump_yaml(recipe))
            yield
        finally:
            lock.release()
            (self.path / _LOCK).unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Puts a whole file in place.

        Raises:
            OutputError: the disk failed.
        """

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        self.make(name, write)

    def make(self, name: str, write: Callable[[Path], None]) -> None:
        """Lets `write` make a file beside, and then puts it in place.

        Raises:
            OutputError: the disk failed.
        """
        path, beside = self.path / name, self.path / f".{name}"
        with disk_errors(path, "write"):
            write(beside)
            os.replace(beside, path)  # noqa: PTH105 - of one folder, atomically


def read_front(folder: Path) -> dict[str, Any]:
    """The results in the folder of a preview.

    Raises:
        RecipeError: there are none.
    """
    path = folder if folder.name == FRONT_NAME else folder / FRONT_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{shown(path)}: cannot be read ({error}); expected the folder of a preview") from error
    if not isinstance(found, dict) or found.get("kind") != "preview":
        raise RecipeError(f"{shown(path)}: is not the result of a preview; expected its {FRONT_NAME}")
    return found
