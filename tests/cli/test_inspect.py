"""`bayes-merge inspect`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.conftest import TinyCheckpoints


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyCheckpoints) -> Path:
    return tiny_checkpoint("llama", dtype="bfloat16")


@pytest.fixture
def with_sidecar(checkpoint: Path, tmp_path: Path) -> Path:
    import torch

    from mergekit_bayes.checkpoint.fingerprint import fingerprint
    from mergekit_bayes.checkpoint.index import open_checkpoint
    from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, write_sidecar

    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    tensors = open_checkpoint(folder).tensors
    metadata = SidecarMetadata(
        family="diagonal",
        estimator="fisher",
        space="full",
        mean_fingerprint=fingerprint(tensors),
        loss_unit="token",
        num_examples=7,
        prior_precision=2.0,
    )
    write_sidecar(folder, {name: torch.ones(info.shape) for name, info in tensors.items()}, metadata)
    return folder


def test_a_checkpoint(command: Command, checkpoint: Path) -> None:
    from mergekit_bayes.checkpoint.fingerprint import fingerprint
    from mergekit_bayes.checkpoint.index import open_checkpoint

    tensors = open_checkpoint(checkpoint).tensors
    done = command("inspect", checkpoint)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{checkpoint}: checkpoint"
    facts = dict(line.strip().split(maxsplit=1) for line in lines[1:])
    assert facts["tensors"] == f"{len(tensors)}: {len(tensors)} BF16"
    assert facts["parameters"] == f"{sum(info.numel for info in tensors.values()):,}"
    assert facts["fingerprint"] == fingerprint(tensors)
    assert facts["model_type"] == "llama"


def test_every_tensor_on_request(command: Command, checkpoint: Path) -> None:
    from mergekit_bayes.checkpoint.index import open_checkpoint

    short, full = command("inspect", checkpoint).out, command("inspect", checkpoint, "--tensors").out
    listed = [line.split() for line in full.splitlines()[len(short.splitlines()) :]]
    tensors = open_checkpoint(checkpoint).tensors
    assert listed == [["BF16", "x".join(map(str, info.shape)), name] for name, info in tensors.items()]


def test_an_adapter(command: Command, tiny_adapter: TinyCheckpoints) -> None:
    adapter = tiny_adapter("llama", seed=1, r=4)
    done = command("inspect", adapter)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{adapter}: LoRA adapter\n")
    assert "of rank 4, scaling" in done.out


def test_a_checkpoint_with_its_sidecar(command: Command, with_sidecar: Path) -> None:
    done = command("inspect", with_sidecar)
    assert (done.code, done.err) == (0, "")
    assert [line for line in done.out.splitlines() if not line.startswith(" ")] == [
        f"{with_sidecar}: checkpoint",
        f"{with_sidecar / 'precision.safetensors'}: precision sidecar",
    ]
    facts = dict(line.strip().split(maxsplit=1) for line in done.out.splitlines())
    assert (facts["estimator"], facts["num_examples"], facts["prior_precision"]) == ("fisher", "7", "2.0")
    assert "ess" not in facts  # not recorded


def test_a_sidecar_by_itself(command: Command, with_sidecar: Path) -> None:
    path = with_sidecar / "precision.safetensors"
    whole = command("inspect", with_sidecar).out
    assert command("inspect", path).out == whole[whole.index(f"{path}: ") :]


def test_any_safetensors_file(command: Command, checkpoint: Path) -> None:
    done = command("inspect", checkpoint / "model.safetensors")
    assert done.code == 0
    assert done.out.startswith(f"{checkpoint / 'model.safetensors'}: safetensors file\n")


@pytest.mark.parametrize("name", ["none", "", "config.json", "text.txt"])
def test_what_is_no_model_is_refused(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("hello")
    done = command("inspect", tmp_path / name)
    assert (done.code, done.out) == (2, "")
    assert str(tmp_path / name) in done.err
