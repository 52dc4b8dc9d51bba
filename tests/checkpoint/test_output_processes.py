"""Outputs and other processes: second writers, processes that do not lead, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint import lock as lock_module
from mergekit_bayes.checkpoint.lock import FolderLock
from mergekit_bayes.errors import OutputError
from tests.checkpoint.outputs import contents, leave_unfinished, output_at


def run_python(script: str, folder: Path) -> subprocess.Popen[str]:
    start = "import pathlib, time\nfrom mergekit_bayes.checkpoint.output import OutputFolder\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + textwrap.dedent(script)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


HOLD = """
with OutputFolder(pathlib.Path("out"), overwrite=False, inputs=[], job="1") as output:
    (output.staging / "a").write_text("of the child")
    output.finish("a", {"by": "the child"})
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("job", ["1", "2"])
def test_a_second_writer_is_refused_and_disturbs_nothing(tmp_path: Path, job: str) -> None:
    child = run_python(HOLD, tmp_path)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(OutputError, match=rf"out: another run \(process {child.pid} on"):
            output_at(tmp_path / "out", job=job).__enter__()
        with pytest.raises(OutputError, match="another run"):
            output_at(tmp_path / "out", job=job).recover()
        assert contents(tmp_path / ".out.partial" / "staging") == {"a": "of the child"}
    finally:
        child.kill()
        child.communicate()
    with output_at(tmp_path / "out") as output:
        assert output.finished("a") == {"by": "the child"}


def test_two_writers_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with output_at(tmp_path / "out") as output:
        with pytest.raises(OutputError, match="another run"):
            output_at(tmp_path / "out").__enter__()
        (output.staging / "a").write_text("1")
        output.publish()
    assert contents(tmp_path / "out") == {"a": "1"}


def test_outputs_side_by_side_do_not_disturb_each_other(tmp_path: Path) -> None:
    with output_at(tmp_path / "a") as a, output_at(tmp_path / "b") as b:
        (a.staging / "x").write_text("a")
        (b.staging / "x").write_text("b")
        b.publish()
        a.publish()
    assert contents(tmp_path / "a") == {"x": "a"}
    assert contents(tmp_path / "b") == {"x": "b"}


def test_many_at_once_give_one_whole_output(tmp_path: Path) -> None:
    script = """
    import os
    from mergekit_bayes.errors import OutputError
    try:
        with OutputFolder(pathlib.Path("out"), overwrite=False, inputs=[], job=str(os.getpid())) as output:
            for name in "abc":
                (output.staging / name).write_text(str(os.getpid()))
            output.publish()
    except OutputError as error:
        print("refused:", error)
    """
    children = [run_python(script, tmp_path) for _ in range(6)]
    told = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 6, told
    assert sum(not out for out, _ in told) == 1
    assert len(set(contents(tmp_path / "out").values())) == 1
    assert set(contents(tmp_path / "out")) == set("abc")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_lock_on_a_file_that_its_holder_has_just_deleted_is_worth_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FolderLock(tmp_path / "work" / "lock", tmp_path)
    at_once = lock_module._lock_at_once
    calls = []

    def after_the_holder_left(descriptor: int) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            lock.path.unlink()
        return at_once(descriptor)

    monkeypatch.setattr(lock_module, "_lock_at_once", after_the_holder_left)
    lock.acquire()
    assert len(calls) == 2
    with pytest.raises(OutputError, match="another run"):
        FolderLock(lock.path, tmp_path).acquire()
    lock.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_another_process_publishes_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = FolderLock.acquire

    def after_the_other(lock: FolderLock) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("of the other")
        acquire(lock)

    monkeypatch.setattr(FolderLock, "acquire", after_the_other)
    with pytest.raises(OutputError, match="not empty"):
        output_at(tmp_path / "out").__enter__()
    assert contents(tmp_path / "out") == {"a": "of the other"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_signal_ends_the_merge_but_not_what_was_finished(tmp_path: Path, number: signal.Signals) -> None:
    child = run_python(HOLD, tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    child.communicate(timeout=30)
    assert child.returncode == -number
    assert not (tmp_path / "out").exists()
    with output_at(tmp_path / "out") as output:
        assert output.finished("a") == {"by": "the child"}
        output.publish()
    assert contents(tmp_path / "out") == {"a": "of the child"}


def test_a_process_that_does_not_lead_sees_what_is_finished(tmp_path: Path) -> None:
    with output_at(tmp_path / "out") as output, output_at(tmp_path / "out", leader=False) as other:
        assert other.staging == output.staging
        output.finish("a", {"by": "the leader"})
        assert other.finished("a") == {"by": "the leader"}
        other.finish("b", {"by": "another"})
        assert output.finished("b") == {"by": "another"}
        output.publish()


def test_a_process_that_does_not_lead_neither_locks_nor_clears_nor_publishes(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out", job="2")
    before = sorted(tmp_path.rglob("*"))
    with output_at(tmp_path / "out", leader=False) as output, pytest.raises(ValueError, match="only the leader"):
        output.publish()
    assert sorted(tmp_path.rglob("*")) == before
