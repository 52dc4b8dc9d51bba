"""Runs in processes of their own: killed at any moment, or two that train together."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergekit_bayes.checkpoint.sidecar import open_sidecar
from tests.finetune import killed, two_runs
from tests.finetune.runs import log_of, recipe, run, same_tensors, tensors_of


def output_of(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_continues_to_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    whole = run(recipe(llama, training=killed.TRAINING), tmp_path / "whole").folder
    lines = output_of([sys.executable, killed.__file__, str(llama), str(tmp_path)]).splitlines()
    assert len(lines) == len(killed.MOMENTS)
    # some were killed in the middle of a checkpoint, some between two, and one while the output was put in place
    assert any(".checkpoint-8.new" in line for line in lines)
    for number, line in enumerate(lines):
        assert " -9 " in line, line
        assert line.endswith(" 0"), line
        assert same_tensors(tmp_path / f"{number}", whole), line
        losses = [row.get("loss") for row in log_of(tmp_path / f"{number}")]
        assert losses == [row.get("loss") for row in log_of(whole)]
    assert not list(tmp_path.glob(".*.partial"))


@pytest.fixture(scope="module")
def two(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes leave behind, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, two_runs.__file__, str(llama), str(bert), str(folder)]
    return folder, output_of(command, ACCELERATE_USE_CPU="true")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "samples", "classifier", "full"])
def test_two_processes_learn_what_one_learns(
    two: tuple[Path, str], llama: Path, bert: Path, tmp_path: Path, name: str
) -> None:
    one = run(two_runs.recipes(llama, bert, rows=4)[name], tmp_path / "one").folder
    left, right = tensors_of(two[0] / name), tensors_of(one)
    assert left.keys() == right.keys()
    for key, tensor in right.items():
        # gradients that vanish but for rounding, as those of keys, are compared with zero
        size = max(float(tensor.abs().max()), 1e-2)
        torch.testing.assert_close(left[key], tensor, rtol=1e-3, atol=2e-6 * size, msg=key)
    for mine, theirs in zip(log_of(two[0] / name), log_of(one), strict=True):
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)
        for data_set, scores in theirs.get("eval", {}).items():
            assert mine["eval"][data_set] == pytest.approx(scores, rel=1e-4)


@pytest.mark.slow
def test_each_process_may_draw_its_own_noise(two: tuple[Path, str], llama: Path, tmp_path: Path) -> None:
    shared = run(recipe(llama, training={"max_steps": 5}), tmp_path / "shared").folder
    assert open_sidecar(two[0] / "own noise").metadata.num_examples == open_sidecar(shared).metadata.num_examples
    assert not same_tensors(two[0] / "own noise", shared)
    losses = [row["loss"] for row in log_of(two[0] / "own noise") if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in log_of(shared) if "loss" in row], rel=0.05)


@pytest.mark.slow
def test_processes_stop_together_and_one_may_continue(
    two: tuple[Path, str], llama: Path, bert: Path, tmp_path: Path
) -> None:
    said = [line for line in two[1].splitlines() if "stopped" in line]
    assert len(said) == 2
    assert all("after step 3 of 5; " in line and "checkpoint-3 is saved" in line for line in said)
    shutil.copytree(two[0] / ".stopped.partial", tmp_path / ".stopped.partial")
    one = run(two_runs.recipes(llama, bert, rows=4)["samples"], tmp_path / "stopped").folder
    left, right = tensors_of(one), tensors_of(two[0] / "samples")
    for key in (key for key in right if "checkpoints" not in key):
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=2e-6 * float(right[key].abs().max()))


@pytest.mark.slow
def test_processes_that_do_not_know_of_each_other_are_refused(llama: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, '.'); from tests.finetune.runs import recipe, run; "
        f"run(recipe({str(llama)!r}), {str(tmp_path / 'out')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=False, env={**os.environ, "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "so each would train on its own" in done.stderr
    assert not (tmp_path / "out").exists()
