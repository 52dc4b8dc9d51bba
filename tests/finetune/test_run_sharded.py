"""Two processes that hold a model in shards (FSDP 2 through Accelerate): they learn what one process learns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import TinyCheckpoints
from tests.finetune import two_sharded_runs
from tests.finetune.runs import log_of, run, same_tensors, tensors_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(llama: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    from tests.model.builders import with_tokenizer

    root = tmp_path_factory.mktemp("sharded")
    shutil.copytree(llama, root / "llama")
    shutil.copytree(bert, root / "bert")
    with_tokenizer(tiny_checkpoint("llama_tied"), root / "llama_tied", pad=True)
    return root


@pytest.fixture(scope="module")
def two(bases: Path) -> tuple[Path, str]:
    """What two processes leave behind, and what they said."""
    folder = bases / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, two_sharded_runs.__file__, str(bases), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def alike(left: Path, right: Path) -> None:
    """The same tensors to rounding, in weights, sidecar and every checkpoint, and the same log."""
    mine, theirs = tensors_of(left), tensors_of(right)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        size = max(float(tensor.abs().max()), 1e-2)
        torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=2e-6 * size, msg=key)
    for one, other in zip(log_of(left), log_of(right), strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
        assert one.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-4)
        assert one.get("ivon", {}) == pytest.approx(other.get("ivon", {}), rel=1e-4)
        for data_set, scores in other.get("eval", {}).items():
            assert one["eval"][data_set] == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("name", ["lora", "full", "tied", "samples", "classifier", "adamw"])
def test_shards_learn_what_a_whole_model_learns(two: tuple[Path, str], bases: Path, tmp_path: Path, name: str) -> None:
    """Micro-batches, clipping, gradient checkpointing, tied weights, squared gradients, a head, another optimizer."""
    alike(two[0] / name, run(two_sharded_runs.recipes(bases, rows=4)[name], tmp_path / "one").folder)


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 base"])
def test_low_precision_is_that_of_one_process(two: tuple[Path, str], bases: Path, tmp_path: Path, name: str) -> None:
    one = run(two_sharded_runs.recipes(bases, rows=4)[name], tmp_path / "one").folder
    mine, theirs = tensors_of(two[0] / name), tensors_of(one)
    assert {key: tensor.dtype for key, tensor in mine.items()} == {key: t.dtype for key, t in theirs.items()}
    losses, expected = ([row["loss"] for row in log_of(folder) if "loss" in row] for folder in (two[0] / name, one))
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "adamw"])
def test_a_run_in_shards_continues_to_the_same_bytes(two: tuple[Path, str], name: str) -> None:
    said = [line for line in two[1].splitlines() if f".{name}, stopped.partial" in line]
    assert len(said) == 2
    assert all("after step 3 of 5; " in line and "checkpoint-3 is saved" in line for line in said)
    shutil.rmtree(two[0] / f"{name}, stopped" / "checkpoints" / "checkpoint-3")
    assert same_tensors(two[0] / f"{name}, stopped", two[0] / name)


def test_a_checkpoint_of_shards_is_one_of_any_number_of_processes(
    two: tuple[Path, str], bases: Path, tmp_path: Path
) -> None:
    content = two_sharded_runs.recipes(bases, rows=4)["lora"]
    checkpoint = str(two[0] / "lora" / "checkpoints" / "checkpoint-2")
    content["training"]["resume_from_checkpoint"] = checkpoint
    one, other = tensors_of(run(content, tmp_path / "one").folder), tensors_of(two[0] / "lora")
    for key in (key for key in one if "checkpoint-2" not in key):
        size = max(float(other[key].abs().max()), 1e-2)
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=2e-6 * size, msg=key)


def test_a_loss_of_one_process_that_is_not_finite_skips_the_step_in_all(two: tuple[Path, str]) -> None:
    report = json.loads((two[0] / "spoiled" / "finetune_report.json").read_text())
    assert report["length"]["skipped"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(two[0] / "spoiled").values())
