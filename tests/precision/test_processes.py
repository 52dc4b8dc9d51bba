"""Sums of two processes are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.precision.test_kronecker import dense
from tests.precision.two_processes import share


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "tests.precision.two_processes", str(tmp_path / "found.pt")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    two, one = torch.load(tmp_path / "found.pt"), share(0, 1)
    assert two.keys() == one.keys()
    weights = ("first.weight", "second.weight")
    for kind in one:
        # eigenvectors may differ in sign
        mine, other = (
            {name: dense(name, each[kind]) for name in weights} if "True" in kind else each[kind] for each in (two, one)
        )
        for name, value in other.items():
            size = float(value.abs().max())
            torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6 * size, msg=f"{kind} {name}")
