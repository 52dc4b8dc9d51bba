"""Outputs of machines that stop: at every system call, between two renames, during the last clean-up."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint.work import WorkFolder
from mergekit_bayes.errors import OutputError
from tests.checkpoint.outputs import contents, leave_unfinished, output_at, publish

CRASHES = Path(__file__).with_name("crashes.py")


FAULTS = ("kill before", "kill after", "kill twice", "error", "interrupt")
SCENARIOS = ("absent", "empty", "former", "same job", "other job", "cut swap")
QUICK = {
    ("absent", "kill before"),
    ("former", "kill after"),
    ("same job", "kill twice"),
    ("other job", "interrupt"),
    ("cut swap", "error"),
}


@pytest.mark.parametrize(
    ("scenario", "fault"),
    [
        pytest.param(scenario, fault, marks=[] if (scenario, fault) in QUICK else pytest.mark.slow)
        for scenario in SCENARIOS
        for fault in FAULTS
    ],
)
def test_no_fault_at_any_system_call_leaves_half_an_output(scenario: str, fault: str) -> None:
    command = [sys.executable, "-W", "ignore", str(CRASHES), scenario, fault]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert result["calls"] > 30


@pytest.mark.parametrize("finished", [True, False])
def test_a_failed_publication_puts_the_former_output_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    publish(tmp_path / "out", {"a": "old"})
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "staging":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with output_at(tmp_path / "out", overwrite=True) as output, monkeypatch.context() as patch:
        (output.staging / "a").write_text("new")
        if finished:
            output.finish("a", {})
        patch.setattr(os, "rename", fail)
        with pytest.raises(OutputError, match="out: cannot publish: Input/output error"):
            output.publish()
        patch.undo()
    assert contents(tmp_path / "out") == {"a": "old"}
    assert (tmp_path / ".out.partial").exists() == finished


def test_a_job_may_return_after_another_had_begun_to_clear_it_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unfinished(tmp_path / "out", job="1")
    other = WorkFolder(tmp_path / "out")
    other.lock.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop_before_staging)
        with pytest.raises(KeyboardInterrupt):
            other.prepare("2")
    other.lock.release()
    with output_at(tmp_path / "out", job="1") as output:
        assert output.finished("a") is None
        (output.staging / "a").write_text("again")
        output.finish("a", {})
        output.publish()
    assert contents(tmp_path / "out") == {"a": "again"}


def stop_before_staging(folder: Path) -> None:
    if folder.name == "staging":
        raise KeyboardInterrupt
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def interrupted_swap(folder: Path) -> None:
    """The state of a machine that stopped between the two renames of a replacement."""
    publish(folder / "out", {"a": "old"})
    leave_unfinished(folder / "out2")
    (folder / ".out2.partial").rename(folder / ".out.partial")
    (folder / "out").rename(folder / ".out.partial" / "replaced")


@pytest.mark.parametrize("target", ["absent", "empty"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_former_output_is_put_back_after_an_interrupted_swap(tmp_path: Path, overwrite: bool, target: str) -> None:
    interrupted_swap(tmp_path)
    if target == "empty":
        (tmp_path / "out").mkdir()
    output_at(tmp_path / "out", overwrite=overwrite).recover()
    assert contents(tmp_path / "out") == {"a": "old"}
    assert not (tmp_path / ".out.partial" / "replaced").exists()
    with output_at(tmp_path / "out", overwrite=True) as output:
        assert output.finished("a") == {"job": "1"}


def test_without_overwrite_the_former_output_is_put_back_and_kept(tmp_path: Path) -> None:
    interrupted_swap(tmp_path)
    with pytest.raises(OutputError, match="not empty"), output_at(tmp_path / "out"):
        pass
    assert contents(tmp_path / "out") == {"a": "old"}


def test_of_two_claims_to_the_target_neither_is_destroyed(tmp_path: Path) -> None:
    interrupted_swap(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b").write_text("someone else's")
    for _ in range(2):
        with pytest.raises(OutputError, match="former content"), output_at(tmp_path / "out", overwrite=True):
            pass
    assert contents(tmp_path / "out") == {"b": "someone else's"}
    assert contents(tmp_path / ".out.partial" / "replaced") == {"a": "old"}


def test_what_a_killed_clean_up_left_is_removed_even_without_overwrite(tmp_path: Path) -> None:
    publish(tmp_path / "out", {"a": "new"})
    leave_unfinished(tmp_path / "out2")
    work = (tmp_path / ".out2.partial").rename(tmp_path / ".out.partial")
    (work / "staging").rename(work / "replaced")
    with pytest.raises(OutputError, match="not empty"), output_at(tmp_path / "out"):
        pass
    assert contents(tmp_path / "out") == {"a": "new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_half_deleted_former_output_is_never_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "out", {"a": "old", "b": "old"})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", delete_one_file)
        with pytest.warns(UserWarning, match=r"cannot be removed: .*busy"):
            publish(tmp_path / "out", {"a": "new"}, overwrite=True)
    assert contents(tmp_path / "out") == {"a": "new"}
    shutil.rmtree(tmp_path / "out")
    output_at(tmp_path / "out").recover()
    assert list(tmp_path.iterdir()) == []


def delete_one_file(folder: Path) -> None:
    next(folder.iterdir()).unlink()
    raise OSError(errno.EBUSY, "busy")


def test_recovery_of_nothing_is_nothing(tmp_path: Path) -> None:
    output_at(tmp_path / "missing" / "out").recover()
    assert list(tmp_path.iterdir()) == []


def test_rubbish_that_cannot_be_removed_is_a_warning_and_goes_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: WorkFolder) -> None:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", refuse)
        with pytest.warns(UserWarning, match="cannot be removed: .*busy"):
            publish(tmp_path / "out", {"a": "1"})
    assert contents(tmp_path / "out") == {"a": "1"}
    output_at(tmp_path / "out").recover()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
