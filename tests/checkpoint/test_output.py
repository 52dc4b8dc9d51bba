"""The life of an output folder: staged, published, stopped and continued, refused by the disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest

from mergekit_bayes.errors import (
    CheckpointError,
    MergekitBayesError,
    NonFiniteError,
    NumericalError,
    OutputError,
    RecipeError,
)
from tests.checkpoint.outputs import contents, leave_unfinished, output_at, publish, work_on

# Publishing


@pytest.mark.parametrize("present", ["absent", "empty"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_is_published_whole_and_nothing_else_is_left(tmp_path: Path, present: str, overwrite: bool) -> None:
    if present == "empty":
        (tmp_path / "out").mkdir()
    publish(tmp_path / "out", {"a": "1", "b": "2"}, overwrite=overwrite)
    assert contents(tmp_path / "out") == {"a": "1", "b": "2"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_nothing_is_seen_at_the_target_before_publication(tmp_path: Path) -> None:
    with output_at(tmp_path / "out") as output:
        (output.staging / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        assert output.staging.parent.parent == tmp_path
        output.publish()
        assert contents(tmp_path / "out") == {"a": "1"}


def test_overwriting_leaves_no_file_of_the_former_output(tmp_path: Path) -> None:
    publish(tmp_path / "out", {"model-00001-of-00002.safetensors": "x", "config.json": "x"})
    with output_at(tmp_path / "out", overwrite=True) as output:
        (output.staging / "config.json").write_text("new")
        assert contents(tmp_path / "out")["config.json"] == "x"
        output.publish()
    assert contents(tmp_path / "out") == {"config.json": "new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_error_keeps_the_former_output(tmp_path: Path) -> None:
    publish(tmp_path / "out", {"a": "old"})
    with pytest.raises(NonFiniteError):
        work_on(tmp_path / "out", done={"a": {}}, stop=NonFiniteError("NaN"), overwrite=True)
    assert contents(tmp_path / "out") == {"a": "old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("name", ["wöîrd ünd spaces", "-rf", "a.b", ".hidden", "模型", "new\nline", "x" * 246])
def test_any_name_of_a_folder_will_do(tmp_path: Path, name: str) -> None:
    if len(name) > 200:
        name = name[:246]
    publish(tmp_path / "p q" / name, {"a": "1"})
    assert contents(tmp_path / "p q" / name) == {"a": "1"}


def test_a_relative_path_means_the_folder_at_the_time_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    output = output_at(Path("../made/here"))
    monkeypatch.chdir(tmp_path)
    with output:
        output.publish()
    assert (tmp_path / "made" / "here").is_dir()


@pytest.mark.parametrize("present", [True, False])
def test_a_symbolic_link_is_followed_and_stays(tmp_path: Path, present: bool) -> None:
    (tmp_path / "disk").mkdir()
    if present:
        publish(tmp_path / "disk" / "real", {"a": "old", "b": "old"})
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    publish(tmp_path / "link", {"a": "new"}, overwrite=present)
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "disk" / "real") == {"a": "new"}
    assert list((tmp_path / "disk").iterdir()) == [tmp_path / "disk" / "real"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    script = f"""
    import os, pathlib
    from mergekit_bayes.checkpoint.output import OutputFolder
    os.umask({umask})
    with OutputFolder(pathlib.Path("new/out"), overwrite=False, inputs=[], job="1") as output:
        (output.staging / "a").write_text("1")
        output.publish()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True)
    for path in (tmp_path / "new", tmp_path / "new" / "out"):
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "new" / "out" / "a").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("filled", [True, False])
def test_a_folder_closed_to_others_stays_closed(tmp_path: Path, filled: bool) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    if filled:
        (tmp_path / "out" / "a").write_text("old")
    publish(tmp_path / "out", {"a": "new"}, overwrite=filled)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_a_file_that_appears_in_the_target_meanwhile_is_not_destroyed(tmp_path: Path) -> None:
    with output_at(tmp_path / "out") as output:
        (output.staging / "a").write_text("new")
        output.finish("a", {})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("keep")
        with pytest.raises(OutputError, match="out: cannot publish"):
            output.publish()
    assert contents(tmp_path / "out") == {"precious": "keep"}
    (tmp_path / "out" / "precious").unlink()
    with output_at(tmp_path / "out") as output:
        assert output.finished("a") == {}
        output.publish()
    assert contents(tmp_path / "out") == {"a": "new"}


def test_publishing_twice_or_outside_the_context_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    output = output_at(tmp_path / "out")
    with pytest.raises(ValueError, match="only the leader"):
        output.publish()
    with output:
        output.publish()
        with pytest.raises(ValueError, match="once"):
            output.publish()


def test_everything_is_synchronised_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rename gives atomicity, not durability: the order of system calls is the promise."""
    calls: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        sync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        calls.append(f"{source} -> {target}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    with output_at(tmp_path / "out") as output:
        staging = output.staging
        (staging / "sub").mkdir()
        for name in ("a", "sub/b"):
            (staging / name).write_text("1")
        output.publish()
    moved = calls.index(f"{staging} -> {tmp_path / 'out'}")
    assert {str(staging / n) for n in ("a", "sub/b", "sub", ".")} - {f"{staging}/."} <= set(calls[:moved])
    assert str(staging) in calls[:moved]
    assert str(tmp_path) in calls[moved:]


def test_a_file_is_synchronised_before_the_journal_calls_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    replace = os.replace

    def note_sync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115

    def check_replace(source: Path, target: Path) -> None:
        assert {str(output.staging / "a"), str(output.staging)} <= set(synced)
        replace(source, target)
        synced.append("renamed")

    with output_at(tmp_path / "out") as output:
        (output.staging / "a").write_text("1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", note_sync)
            patch.setattr(os, "replace", check_replace)
            output.finish("a", {})
    assert synced[-2:] == ["renamed", str(output.staging.parent / "journal")]


# Stopping and continuing


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OutputError, RuntimeError, SystemExit, MemoryError, None])
def test_finished_items_survive_what_a_rerun_may_overcome(tmp_path: Path, stop: type[BaseException] | None) -> None:
    record: dict[str, object] = {"mismatch": 1.5, "names": ["x", None]}
    with pytest.raises(stop) if stop is not None else nullcontext():
        work_on(tmp_path / "out", done={"a": record}, half=["b"], stop=None if stop is None else stop())
    assert not (tmp_path / "out").exists()
    with output_at(tmp_path / "out") as output:
        assert output.finished("a") == record
        assert output.finished("b") is None
        assert contents(output.staging) == {"a": "a of job 1"}
        (output.staging / "b").write_text("whole")
        output.publish()
    assert contents(tmp_path / "out") == {"a": "a of job 1", "b": "whole"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("stop", [NonFiniteError, NumericalError, CheckpointError, RecipeError])
def test_nothing_is_kept_where_a_rerun_would_fail_again(tmp_path: Path, stop: type[MergekitBayesError]) -> None:
    with pytest.raises(stop):
        work_on(tmp_path / "new" / "deep" / "out", done={"a": {}}, stop=stop("bad input"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OutputError, RuntimeError])
def test_nothing_is_kept_where_nothing_was_finished(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(stop):
        work_on(tmp_path / "here" / "new" / "out", done={}, half=["a"], stop=stop())
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("stop", [NonFiniteError, RecipeError, KeyboardInterrupt])
def test_what_is_precious_survives_every_error(tmp_path: Path, stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        work_on(tmp_path / "out", done={"a": {}}, stop=stop("bad input"), precious=True)
    with output_at(tmp_path / "out") as output:
        assert output.finished("a") == {}


def test_a_forgotten_item_is_gone_with_its_files_and_their_folders(tmp_path: Path) -> None:
    with output_at(tmp_path / "out") as output:
        for name in ("deep/one/x", "deep/two/x"):
            (output.staging / name).parent.mkdir(parents=True)
            (output.staging / name).write_text(name)
            output.finish(name, {}, files=[name])
        output.forget("deep/one/x")
        output.forget("never finished")
        assert output.finished("deep/one/x") is None
        assert output.finished("deep/two/x") == {}
        assert [path.name for path in (output.staging / "deep").iterdir()] == ["two"]
        output.forget("deep/two/x")
        assert list(output.staging.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_another_job_starts_from_nothing(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out", job="1")
    with output_at(tmp_path / "out", job="2") as output:
        assert output.finished("a") is None
        assert contents(output.staging) == {}
        output.publish()
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("damage", ["missing", "shorter", "longer"])
def test_an_item_whose_file_changed_is_not_finished(tmp_path: Path, damage: str) -> None:
    leave_unfinished(tmp_path / "out")
    file = tmp_path / ".out.partial" / "staging" / "a"
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 3 if damage == "shorter" else 300)
    with output_at(tmp_path / "out") as output:
        assert output.finished("a") is None
        assert contents(output.staging) == {}


def test_a_damaged_entry_of_the_journal_means_unfinished(tmp_path: Path) -> None:
    leave_unfinished(tmp_path / "out")
    (entry,) = (tmp_path / ".out.partial" / "journal").iterdir()
    entry.write_text('{"item": "a"')
    with output_at(tmp_path / "out") as output:
        assert output.finished("a") is None


def test_an_item_may_have_any_name_and_any_files(tmp_path: Path) -> None:
    with output_at(tmp_path / "out") as output:
        for name in ("x", "y"):
            (output.staging / name).write_text(name)
        output.finish("../../layer 0 / müde" * 30, {"n": 1}, files=["x", "y"])
        output.finish("no file at all", {"n": 2})
    with output_at(tmp_path / "out") as output:
        assert output.finished("../../layer 0 / müde" * 30) == {"n": 1}
        assert output.finished("no file at all") == {"n": 2}
        assert contents(output.staging) == {"x": "x", "y": "y"}
        (output.staging / "y").unlink()
        assert output.finished("../../layer 0 / müde" * 30) is None


def test_an_item_is_not_finished_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="lost: cannot synchronise"), output_at(tmp_path / "out") as output:
        output.finish("item", {}, files=["lost"])
    assert list(tmp_path.iterdir()) == []


def test_a_finished_item_can_be_replaced_by_a_newer_record(tmp_path: Path) -> None:
    with output_at(tmp_path / "out") as output:
        output.finish("a", {"n": 1})
        output.finish("a", {"n": 2})
        assert output.finished("a") == {"n": 2}


# Disks that refuse


def test_space_is_measured_before_work(tmp_path: Path) -> None:
    output = output_at(tmp_path / "deep" / "out")
    output.require_space(1)
    with pytest.raises(OutputError, match=r"out: 1,000,000,000,000,000,000 bytes \(1000\.0 PB\) needed, .* free"):
        output.require_space(10**18)
    assert list(tmp_path.iterdir()) == []


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(100_000))


def test_a_disk_that_fills_up_keeps_what_was_finished(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(2_000_000))
    with output_at(small_disk / "out") as output:
        output.require_space(2_000_000)
        (output.staging / "a").write_bytes(bytes(1_000_000))
        output.finish("a", {"n": 1})
        with pytest.raises(OutputError, match=r"needed, .* free on the disk of .*free some space"):
            output.require_space(2_000_000)
        with pytest.raises(OSError, match="No space left"):
            fill(output.staging / "b")
        with pytest.raises(OutputError, match=r"No space left.*100,.* needed; .* free; free some space"):
            output.finish("c", {"big": "x" * 100_000})
    (small_disk / "ballast").unlink()
    with output_at(small_disk / "out") as output:
        assert output.finished("a") == {"n": 1}
        assert output.finished("c") is None
        output.publish()
    assert [path.name for path in (small_disk / "out").iterdir()] == ["a"]


def test_a_read_only_disk_is_refused_before_work(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="cannot be written to"):
        output_at(small_disk / "sub" / "out").check()


def test_loads_without_torch() -> None:
    script = "import sys, mergekit_bayes.checkpoint.output; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
