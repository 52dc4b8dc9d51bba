"""The folder of a sidecar: what lies there is not touched, but for a sidecar that may be replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_bayes.errors import OutputError
from mergekit_bayes.estimate.folder import SidecarFolder


def put(folder: SidecarFolder, *names: str) -> None:
    for name in names:
        (folder.staging / name).write_text(f"new {name}")


def test_files_are_put_beside_others(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    with SidecarFolder(tmp_path, overwrite=False, job="a") as folder:
        put(folder, "precision.safetensors", "precision_report.json", "state")
        assert not (tmp_path / "precision.safetensors").exists()
        folder.publish(["precision_report.json", "precision.safetensors"])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.safetensors": "weights",
        "precision.safetensors": "new precision.safetensors",
        "precision_report.json": "new precision_report.json",
    }


@pytest.mark.parametrize(
    "name", ["precision.safetensors", "precision.safetensors.index.json", "precision-00001-of-00002.safetensors"]
)
def test_a_sidecar_is_replaced_only_if_it_may_be(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(OutputError, match=f"holds {name}; replace the sidecar with `--overwrite`"):
        SidecarFolder(tmp_path, overwrite=False).check()
    with pytest.raises(OutputError), SidecarFolder(tmp_path, overwrite=False, job="a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with SidecarFolder(tmp_path, overwrite=True, job="a") as folder:
        put(folder, "precision.safetensors")
        folder.publish(["precision.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["precision.safetensors"], "no stale shard or index is left"


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), SidecarFolder(tmp_path / "a" / "b", overwrite=False, job="a"):
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with (
        SidecarFolder(tmp_path, overwrite=False, job="a"),
        pytest.raises(OutputError, match="another run"),
        SidecarFolder(tmp_path, overwrite=False, job="a"),
    ):
        pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="must be a folder, and this is a file"):
        SidecarFolder(tmp_path / "file", overwrite=False).check()
    with pytest.raises(OutputError, match="cannot be written to"):
        SidecarFolder(tmp_path / "file" / "inside", overwrite=False).check()


def test_more_than_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needed, .* free on the disk of .*; free some space"):
        SidecarFolder(tmp_path, overwrite=False).require_space(1 << 62)
