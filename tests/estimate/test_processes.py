"""Two processes that share the rows find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.estimate import killed_pass, two_passes
from tests.estimate.runs import recipe, run, sidecar_of


@pytest.fixture(scope="module")
def two(llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes leave behind, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, two_passes.__file__, str(llama), str(adapter), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", two_passes.RECIPES)
def test_two_processes_find_what_one_finds(
    two: tuple[Path, str], llama: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    one = run(recipe(llama, adapter, **two_passes.RECIPES[name]), tmp_path / "one")
    left, right = sidecar_of(two[0] / name), sidecar_of(one.folder)
    assert left.keys() == right.keys()
    for key in right:
        torch.testing.assert_close(_whole(left, key), _whole(right, key), rtol=1e-4, atol=1e-6, msg=key)
    reports = [json.loads((folder / "precision_report.json").read_text()) for folder in (two[0] / name, one.folder)]
    assert [report["processes"] for report in reports] == [2, 1]
    assert all(reports[0][key] == reports[1][key] for key in ("rows", "units", "groups"))


def _whole(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """A tensor; of a basis the curvature of a unit matrix, which does not depend on signs."""
    weight = key.rpartition(".")[0]
    if f"{weight}.eigenvalues" not in tensors:
        return tensors[key]
    u, v = tensors[f"{weight}.output_factor"][0].double(), tensors[f"{weight}.input_factor"][0].double()
    ones = torch.ones(len(u), len(v), dtype=torch.float64)
    return (u @ (tensors[f"{weight}.eigenvalues"][0].double() * (u.T @ ones @ v)) @ v.T).float()


@pytest.mark.slow
def test_processes_that_were_cut_short_go_on_together(two: tuple[Path, str]) -> None:
    assert two[1].count("interrupted") == 2
    one, other = sidecar_of(two[0] / "cut"), sidecar_of(two[0] / "fisher")
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """Killed before the first batch, between two, and while the output is put in place."""
    whole = run(recipe(llama, adapter), tmp_path / "whole").folder
    moments = ("0", "3", "publish")
    done = subprocess.run(
        [sys.executable, killed_pass.__file__, str(llama), str(adapter), str(tmp_path), *moments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.splitlines() == [f"{moment} -9" for moment in moments], done.stderr
    for moment in moments:
        assert not (tmp_path / moment / "precision.safetensors").exists()
        cut = run(recipe(llama, adapter), tmp_path / moment).folder
        assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
        for name in ("precision.safetensors", "convergence.png"):
            assert (cut / name).read_bytes() == (whole / name).read_bytes(), moment
