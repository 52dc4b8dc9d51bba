"""Checkpoints on disk: what goes in comes out, to the bit; what is damaged is refused; a full disk harms nobody."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.errors import CheckpointError, OutputError
from mergekit_bayes.finetune.checkpoints import (
    MARKER,
    Checkpoint,
    find_checkpoints,
    load_checkpoint,
    newest_whole,
    write_checkpoint,
)
from mergekit_bayes.finetune.ivon import IVON


def example(step: int = 3, **state: Any) -> Checkpoint:
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "empty": torch.zeros(0)}
    optimizer = {
        "state": {
            0: {"step": 7, "momentum": torch.randn(3, 4), "hess_init_share": 1 / 3},
            1: {"step": torch.tensor(7.0), "exp_avg": torch.randn(2)},
        },
        "param_groups": [{"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.999), "clip_radius": math.inf}],
    }
    return Checkpoint(step, tensors, optimizer, '{"step": 1}\n', {"counters": {"step": step}, **state})


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_what_was_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    checkpoint = example()
    files = write_checkpoint(tmp_path, checkpoint)
    assert {path.parent for path in files} == {tmp_path / "checkpoint-3"}
    found = load_checkpoint(tmp_path / "checkpoint-3")
    assert (found.step, found.log, found.state) == (checkpoint.step, checkpoint.log, checkpoint.state)
    assert same(dict(checkpoint.trainable), dict(found.trainable))
    assert same(checkpoint.optimizer, found.optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    checkpoint = example()
    for name in ("one", "two"):
        write_checkpoint(tmp_path / name, checkpoint)
    for path in (tmp_path / "one" / "checkpoint-3").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "checkpoint-3" / path.name).read_bytes()


@pytest.mark.parametrize("make", [lambda p: IVON(p, lr=0.1, ess=10.0), lambda p: torch.optim.AdamW(p, lr=0.1)])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path: Path, make: Any) -> None:
    def steps(parameters: list[torch.Tensor], optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            context = optimizer.sampled_params(train=True) if isinstance(optimizer, IVON) else torch.enable_grad()
            with context:
                sum((p.square().sum() for p in parameters), torch.zeros(())).backward()
            optimizer.step()
            optimizer.zero_grad()

    def start() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        parameters: list[torch.Tensor] = [torch.nn.Parameter(torch.arange(4.0)), torch.nn.Parameter(torch.ones(2, 2))]
        return parameters, make(parameters)

    whole, optimizer = start()
    steps(whole, optimizer, 5)
    first, optimizer = start()
    steps(first, optimizer, 3)
    write_checkpoint(tmp_path, Checkpoint(3, {"0": first[0], "1": first[1]}, optimizer.state_dict(), "", {}))
    second, optimizer = start()
    found = load_checkpoint(tmp_path / "checkpoint-3")
    optimizer.load_state_dict(dict(found.optimizer))
    with torch.no_grad():
        for name, parameter in zip("01", second, strict=True):
            parameter.copy_(found.trainable[name])
    steps(second, optimizer, 2)
    assert all(torch.equal(left, right) for left, right in zip(whole, second, strict=True))


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "log.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "shorter", "one bit"])
def test_damage_is_seen_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path, example(step))
    file = tmp_path / "checkpoint-4" / name
    if damage == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content if damage == "one bit" else content[:-1])
    with pytest.raises(CheckpointError, match=f"{name}: is missing or damaged; expected the .* bytes"):
        load_checkpoint(tmp_path / "checkpoint-4")
    found, faults = newest_whole(tmp_path)
    assert found is not None
    assert found.step == 2
    assert len(faults) == 1


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (None, "is no checkpoint of a run"),
        ("{", "cannot be read as the marker"),
        ("[]", "cannot be read as the marker"),
        ("[" * 100_000, "cannot be read as the marker"),
        ({"format": "x"}, "cannot be read as the marker"),
        ({"version": 99}, "version 99; expected"),
        ({"format": "other"}, "format 'other'"),
        ({"files": {"../../x": {}}}, "names the file"),
    ],
)
def test_a_marker_that_is_not_ours_is_refused(tmp_path: Path, marker: Any, message: str) -> None:
    write_checkpoint(tmp_path, example())
    path = tmp_path / "checkpoint-3" / MARKER
    if marker is None:
        path.unlink()
    elif isinstance(marker, str):
        path.write_text(marker)
    elif marker == {"format": "x"}:
        path.write_text(json.dumps(marker))
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **marker}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "checkpoint-3")


def test_only_folders_of_the_right_name_with_a_marker_count(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "missing") == []
    for step in (10, 9):
        write_checkpoint(tmp_path, example(step))
    for name in ("checkpoint-11", "checkpoint-x", ".checkpoint-12.new"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    assert [step for step, _ in find_checkpoints(tmp_path)] == [9, 10]


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, example(note=1))
    write_checkpoint(tmp_path, example(note=2))
    assert load_checkpoint(tmp_path / "checkpoint-3").state["note"] == 2


@pytest.mark.parametrize("place", ["mkdir", "tensors", "marker", "rename"])
def test_a_disk_that_fails_leaves_the_others_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from mergekit_bayes.finetune import checkpoints

    write_checkpoint(tmp_path, example(1))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if place == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    elif place == "tensors":
        monkeypatch.setattr("os.posix_fallocate", fail)
    elif place == "marker":
        monkeypatch.setattr(checkpoints, "sync_tree", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_checkpoint(tmp_path, example(2))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert load_checkpoint(tmp_path / "checkpoint-1").step == 1
