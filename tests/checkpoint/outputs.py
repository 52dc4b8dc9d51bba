"""Small outputs for tests: published, left unfinished, and looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint.output import OutputFolder


def output_at(path: Path, *, overwrite: bool = False, job: str = "1", **options: bool) -> OutputFolder:
    return OutputFolder(path, overwrite=overwrite, inputs=[], job=job, **options)


def publish(path: Path, files: dict[str, str], **options: object) -> None:
    with output_at(path, **options) as output:  # type: ignore[arg-type]
        for name, text in files.items():
            (output.staging / name).write_text(text)
        output.publish()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def work_on(
    path: Path,
    *,
    done: Mapping[str, dict[str, object]],
    half: Sequence[str] = (),
    stop: BaseException | None = None,
    job: str = "1",
    **options: bool,
) -> None:
    """Finish the items of `done`, begin those of `half`, and end by an exception, or by just leaving."""
    with output_at(path, job=job, **options) as output:
        for item, record in done.items():
            (output.staging / item).write_text(f"{item} of job {job}")
            output.finish(item, record)
        for item in half:
            (output.staging / item).write_text("not finished")
        if stop is not None:
            raise stop


def leave_unfinished(path: Path, job: str = "1") -> None:
    """What a run leaves that finished item `a` and was then stopped."""
    with pytest.raises(KeyboardInterrupt):
        work_on(path, done={"a": {"job": job}}, half=["half"], stop=KeyboardInterrupt(), job=job)
