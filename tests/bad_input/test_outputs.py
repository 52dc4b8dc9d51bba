"""Output folders that must not be written, and disks that cannot hold them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint.output import OutputFolder
from tests.bad_input.conftest import Refused
from tests.bad_input.site import Site, write_site
from tests.merge.builders import snapshot


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("one", "{root}/one: the output folder is also an input"),
        ("base/merged", "{root}/base/merged: the output folder lies inside an input ({root}/base)"),
        (".", "lies inside the output folder and would be deleted with it"),
        ("work", "cannot be the current folder"),
    ],
)
def test_an_output_among_the_inputs_is_refused(
    site: Site, refused: Refused, out: str, words: str, options: tuple[str, ...]
) -> None:
    site.out = site.root / out
    if out == "work" and not options:
        (site.out / "something").write_text("kept")
        words = "{root}/work: the folder exists and is not empty"
    refused(words, options=options)


def test_a_folder_that_is_not_empty_is_refused(site: Site, refused: Refused) -> None:
    site.out.mkdir()
    (site.out / "notes.txt").write_text("months of work")
    refused("{root}/out: the folder exists and is not empty", "--overwrite")


def test_a_file_in_place_of_the_folder_is_refused(site: Site, refused: Refused) -> None:
    site.out.write_text("a file")
    refused("{root}/out: the output must be a folder, and this is a file")
    site.out = site.out / "inside"
    refused("{root}/out/inside: cannot be created, because {root}/out is a file")


def test_a_git_repository_is_refused(site: Site, refused: Refused) -> None:
    (site.out / ".git").mkdir(parents=True)
    refused("{root}/out: the folder is a git repository", options=("--overwrite",))


def test_a_sidecar_kept_in_the_output_is_not_deleted_by_overwriting(site: Site, refused: Refused) -> None:
    site.out.mkdir()
    (site.root / "one" / "precision.safetensors").rename(site.out / "mine.safetensors")
    site.recipe["models"][0]["precision"] = str(site.out / "mine.safetensors")
    refused("the input {root}/out/mine.safetensors lies inside the output folder", options=("--overwrite",))


def test_no_output_folder_at_all_is_refused(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    from mergekit_bayes.cli.main import main

    recipe = site.ask()
    before = snapshot(site.root)
    with pytest.raises(SystemExit) as ended:
        main([str(recipe)])
    assert ended.value.code == 2
    assert "output.path: missing; name a folder there" in capsys.readouterr().err
    assert snapshot(site.root) == before


def test_a_folder_without_permission_to_write_is_refused(
    site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so that the refusal of the system is played."""
    allowed = os.access

    def access(path: str | Path, mode: int, **options: bool) -> bool:
        return False if Path(path) == site.root and mode & os.W_OK else allowed(path, mode, **options)

    monkeypatch.setattr(os, "access", access)
    refused("{root}/out: cannot be created, because {root} cannot be written to")


def test_too_little_space_is_seen_before_any_work(
    site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_bayes.checkpoint.disk.free_bytes", lambda path: 100)
    refused("{root}/out:", "needed, 100 bytes free on the disk")


def test_a_second_merge_into_the_same_folder_is_refused(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_bayes.cli.main import main

    monkeypatch.setattr("mergekit_bayes.checkpoint.lock._PATIENCE", 0.0)
    recipe = site.ask()
    with OutputFolder(site.out, overwrite=False, inputs=[], job="another"):
        before = snapshot(site.root)
        with pytest.raises(SystemExit) as ended:
            main([str(recipe), str(site.out)])
        assert ended.value.code == 2
        assert "another run" in capsys.readouterr().err
        assert snapshot(site.root) == before


SAMPLE = {
    "recipe": lambda site: site.recipe.update(sede=1),
    "header": lambda site: (site.root / "one" / "model.safetensors").write_bytes(b""),
    "plan": lambda site: (site.root / "one" / "precision.safetensors").unlink(),
    "values": lambda site: site.recipe["models"][0]["parameters"].update(weight=-5),
}


@pytest.mark.parametrize("broken", SAMPLE)
def test_the_command_itself_ends_with_2_and_one_message(broken: str, tmp_path: Path) -> None:
    """In a process of its own, as users run it."""
    site = write_site(tmp_path)
    SAMPLE[broken](site)  # type: ignore[no-untyped-call]
    recipe = site.ask()
    before = snapshot(tmp_path)
    command = [sys.executable, "-m", "mergekit_bayes", str(recipe), str(site.out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before
