"""Folders that must not become an output: each is refused before any work, and nothing is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.errors import OutputError


def everything(folder: Path) -> list[tuple[str, int, bytes | None]]:
    """Names, modes and contents below a folder."""
    return [
        (str(path), path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    ]


def assert_refused(path: Path, message: str, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    with pytest.raises(OutputError, match=message):
        OutputFolder(path, overwrite=overwrite, inputs=inputs, job="1").check()
    with (
        pytest.raises(OutputError, match=message),
        OutputFolder(path, overwrite=overwrite, inputs=inputs, job="1"),
    ):
        pass


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`base` with a file, `alias` leading to it, a folder of links into it as the hub's cache has, and `out`."""
    (tmp_path / "base" / "sub").mkdir(parents=True)
    (tmp_path / "base" / "model.safetensors").write_text("weights")
    (tmp_path / "alias").symlink_to("base")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "model.safetensors").symlink_to("../base/model.safetensors")
    (tmp_path / "out" / "inner").mkdir(parents=True)
    (tmp_path / "out" / "inner" / "model.safetensors").write_text("weights")
    return tmp_path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "source", "message"),
    [
        ("base", "base", "base: the output folder is also an input"),
        ("base", "alias", r"also an input \(.*alias\)"),
        ("alias", "base", r"base: the output folder is also an input"),
        ("base/merged", "base", "merged: the output folder lies inside an input"),
        ("base/a/b/c", "base", "lies inside an input"),
        ("alias/merged", "base", "lies inside an input"),
        ("base/merged", "alias", "lies inside an input"),
        ("base/sub", "base", "lies inside an input"),
        ("out", "out/inner", r"inner lies inside the output folder and would be deleted"),
        ("out", "out/inner/model.safetensors", r"the input .*model\.safetensors lies inside the output folder"),
        ("base", "links", r"the input .*links lies inside the output folder"),
        ("base/sub/../merged", "base", "lies inside an input"),
    ],
)
def test_inputs_are_never_written_to_nor_deleted(
    models: Path, out: str, source: str, message: str, overwrite: bool
) -> None:
    before = everything(models)
    assert_refused(models / out, message, overwrite=overwrite, inputs=[models / "links" / "x", models / source])
    assert everything(models) == before


def test_relative_paths_are_compared_as_places(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models / "base" / "sub")
    assert_refused(Path("../merged"), "lies inside an input", inputs=[Path("..")])


@pytest.mark.parametrize(("out", "source"), [("base2", "base"), ("merged", "alias"), ("bas", "base")])
def test_a_folder_beside_an_input_is_fine(models: Path, out: str, source: str) -> None:
    with OutputFolder(models / out, overwrite=False, inputs=[models / source], job="1") as output:
        output.publish()
    assert (models / out).is_dir()


def test_an_unfinished_state_is_no_input_of_its_own_output(models: Path) -> None:
    staging = models / ".new.partial" / "staging"
    staging.mkdir(parents=True)
    (staging.parent / "mergekit_bayes.lock").touch()
    assert_refused(models / "new", "unfinished state of this very output", inputs=[staging])
    assert_refused(models / "new", "unfinished state of this very output", inputs=[staging.parent])


@pytest.mark.parametrize("kind", ["file", "folder", "hidden file", "link"])
def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path: Path, kind: str) -> None:
    (tmp_path / "out").mkdir()
    entry = tmp_path / "out" / (".hidden" if kind == "hidden file" else "x")
    if kind == "folder":
        entry.mkdir()
    elif kind == "link":
        entry.symlink_to("nowhere")
    else:
        entry.write_text("precious")
    before = everything(tmp_path)
    assert_refused(tmp_path / "out", r"out: the folder exists and is not empty; .*--overwrite")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_output(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("precious")
    assert_refused(tmp_path / "out", "out: the output must be a folder", overwrite=overwrite)
    assert_refused(tmp_path / "out" / "below", "out is a file", overwrite=overwrite)
    assert_refused(tmp_path / "out" / "far" / "below", "out is a file", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "precious"


def test_a_repository_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out" / ".git").mkdir(parents=True)
    assert_refused(tmp_path / "out", "is a git repository", overwrite=True)
    assert (tmp_path / "out" / ".git").is_dir()


@pytest.mark.parametrize("place", [".", "..", "../.."])
@pytest.mark.parametrize("filled", [False, True])
def test_the_current_folder_and_those_above_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, filled: bool
) -> None:
    here = tmp_path / "a" / "b" / "c"
    here.mkdir(parents=True)
    if filled:
        (here / "x").touch()
    monkeypatch.chdir(here)
    assert_refused(Path(place), "cannot be the current folder or contain it", overwrite=True)
    assert here.is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_root_folder_is_no_output(overwrite: bool) -> None:
    with pytest.raises(OutputError, match="the root folder"):
        OutputFolder(Path("/"), overwrite=overwrite, inputs=[], job="1")


def test_a_mounted_disk_is_no_output_but_a_folder_in_it_is(small_disk: Path) -> None:
    assert_refused(small_disk, "a mounted disk cannot be replaced in one step; name a folder inside it")
    with OutputFolder(small_disk / "out", overwrite=False, inputs=[], job="1") as output:
        output.publish()


@pytest.mark.parametrize(
    ("path", "message"),
    [("x" * 256, "File name too long"), ("x" * 247, "too long.*shorter"), ("a\0b", "cannot follow this path")],
)
def test_impossible_names_are_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        OutputFolder(tmp_path / path, overwrite=False, inputs=[], job="1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "out"])
def test_a_loop_of_links_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match=r"cannot follow this path|loop"):
        OutputFolder(tmp_path / "a" / below, overwrite=False, inputs=[], job="1")


@pytest.mark.parametrize("kind", ["folder", "file", "link to ours", "dangling link", "lock that is a link"])
def test_what_is_not_ours_is_never_cleared_away(tmp_path: Path, kind: str) -> None:
    work, ours = tmp_path / ".out.partial", tmp_path / "ours"
    ours.mkdir()
    (ours / "mergekit_bayes.lock").touch()
    if kind in ("folder", "lock that is a link"):
        (work / "staging").mkdir(parents=True)
        (work / "staging" / "precious").write_text("keep")
    if kind == "lock that is a link":
        (work / "mergekit_bayes.lock").symlink_to(ours / "mergekit_bayes.lock")
    if kind == "file":
        work.write_text("keep")
    if "link" in kind and kind != "lock that is a link":
        work.symlink_to(ours if kind == "link to ours" else tmp_path / "nowhere")
    before = everything(tmp_path)
    assert_refused(tmp_path / "out", r"\.out\.partial: this name is needed .* move it away", overwrite=True)
    OutputFolder(tmp_path / "out", overwrite=True, inputs=[], job="1").recover()
    assert everything(tmp_path) == before


def test_links_in_what_is_cleared_away_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("keep")
    for place in (tmp_path / "out", tmp_path / ".out.partial" / "staging", tmp_path / ".out.partial" / "journal"):
        place.mkdir(parents=True)
        (place / "link").symlink_to(tmp_path / "precious")
    (tmp_path / ".out.partial" / "discarded").symlink_to(tmp_path / "precious")
    (tmp_path / ".out.partial" / "mergekit_bayes.lock").touch()
    with OutputFolder(tmp_path / "out", overwrite=True, inputs=[], job="1") as output:
        output.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]
    assert list((tmp_path / "out").iterdir()) == []
    assert (tmp_path / "precious" / "x").read_text() == "keep"


def test_an_empty_working_folder_is_adopted(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with OutputFolder(tmp_path / "out", overwrite=False, inputs=[], job="1") as output:
        output.publish()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("closed", ["parent", "target"])
def test_without_permission_nothing_is_begun(tmp_path: Path, closed: str) -> None:
    """As a user without privileges, since nothing is closed to root."""
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent" / "out" / "x").touch()
    script = f"""
    import os, pathlib, sys
    from mergekit_bayes.checkpoint.output import OutputFolder
    from mergekit_bayes.errors import OutputError
    parent = pathlib.Path({str(tmp_path / "parent")!r})
    if os.geteuid() == 0:
        folder = parent
        for path in (parent / "out", parent):
            os.chown(path, 65534, 65534)
        # the test runner's own folders are closed to others
        for path in parent.parents:
            if path.stat().st_uid == 0 and not path.stat().st_mode & 1:
                path.chmod(path.stat().st_mode | 0o011)
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    os.chdir("/")
    closed = parent if {closed == "parent"} else parent / "out"
    closed.chmod(0o555)
    for path in ([parent / "new", parent / "new" / "deep"] if {closed == "parent"} else [parent / "out"]):
        for act in ("check", "__enter__"):
            try:
                getattr(OutputFolder(path, overwrite=True, inputs=[], job="1"), act)()
            except OutputError as error:
                print(error)
    closed.chmod(0o755)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == (4 if closed == "parent" else 2)
    assert all(("cannot be written to" in line) or ("no permission to replace" in line) for line in told)
    assert sorted(path.name for path in (tmp_path / "parent").iterdir()) == ["out"]
    assert os.listdir(tmp_path / "parent" / "out") == ["x"]  # noqa: PTH208
