"""Launches that would train twice, alone, or unsharded, without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.model import check_launch

BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def state(processes: int, kind: str) -> Any:
    """What Accelerate made of a launch."""
    return SimpleNamespace(num_processes=processes, distributed_type=SimpleNamespace(value=kind))


@pytest.mark.parametrize(
    ("processes", "kind", "environment"),
    [
        (1, "NO", {}),
        (1, "NO", {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}),
        (2, "MULTI_CPU", {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "true"}),
        (8, "MULTI_GPU", {"WORLD_SIZE": "8", "LOCAL_RANK": "1", **BY_ACCELERATE, **ADDRESS}),
        (2, "FSDP", {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"}),
        (2, "DEEPSPEED", {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"}),
        (1, "NO", BY_ACCELERATE),  # accelerate launch --num_processes 1
        (1, "NO", ADDRESS),  # a shell that has them set
        (4, "MULTI_CPU", {"OMPI_COMM_WORLD_SIZE": "4"}),
        (16, "MULTI_GPU", {"WORLD_SIZE": "16", "LOCAL_RANK": "3", "SLURM_STEP_NUM_TASKS": "2"}),
    ],
)
def test_launches_that_are_what_they_seem(processes: int, kind: str, environment: dict[str, str]) -> None:
    check_launch(state(processes, kind), environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "WORLD_SIZE asks for 2 .* each would train on its own; use "),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE asks for 4 .*--nproc_per_node 4 -m mergekit_bayes"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS asks for 8"),
        ({**BY_ACCELERATE, **ADDRESS}, "asked for several processes and started one"),
    ],
)
def test_a_process_that_would_train_alone(environment: dict[str, str], message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        check_launch(state(1, "NO"), environment)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_sharding_that_is_none(engine: str) -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", f"ACCELERATE_USE_{engine}": "true"}
    with pytest.raises(FinetuneError, match=f"{engine} was asked for .* but Accelerate made MULTI_CPU of it"):
        check_launch(state(2, "MULTI_CPU"), environment)


_PROGRAM = """
import os, pathlib, sys
import accelerate
from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.model.launch import check_launch
accelerator = accelerate.Accelerator()
try:
    check_launch()
    said = "accepted"
except FinetuneError as error:
    said = f"refused {error}"
pathlib.Path(sys.argv[1], os.environ.get("RANK", "alone")).write_text(said)
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (TORCHRUN, ["refused launch: WORLD_SIZE asks for 2 processes"] * 2),
        ([*ACCELERATE, "--cpu", "--num_processes", "2"], ["refused launch: `accelerate launch` was asked"]),
    ],
    ids=["torchrun", "accelerate launch --cpu"],
)
def test_real_launchers(tmp_path: Path, command: list[str], expected: list[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("these launches go wrong on CPUs only")
    program = tmp_path / "train.py"
    program.write_text(_PROGRAM)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    said = tmp_path / "said"
    said.mkdir()
    done = subprocess.run(
        [sys.executable, *command, str(program), str(said)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = [path.read_text() for path in sorted(said.iterdir())]
    assert len(found) == len(expected), done.stdout + done.stderr
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


def test_the_accelerator_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    with pytest.raises(RuntimeError, match="make one first"):
        check_launch()
