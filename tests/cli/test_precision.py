"""Recipes of kind `precision` on the command line: run, plan and what they leave, inspected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.conftest import TinyCheckpoints
from tests.finetune.runs import texts
from tests.golden.compare import GOLDEN, check_golden

RECIPE = """\
kind: precision
model: base
adapter: adapter
data: {train: rows.jsonl}
estimator: kfac
num_examples: 6
"""


@pytest.fixture
def site(tiny_checkpoint: TinyCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base with a tokenizer, an adapter, rows and a recipe, in the current folder."""
    from tests.model.builders import with_tokenizer
    from tests.tiny_models import save_tiny_adapter

    monkeypatch.chdir(tmp_path)
    with_tokenizer(tiny_checkpoint("llama"), tmp_path / "base", pad=True)
    save_tiny_adapter(tmp_path / "base", tmp_path / "adapter", seed=1)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(8)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def test_a_sidecar_beside_the_adapter(command: Command, site: Path) -> None:
    done = command("r.yaml")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith(f"{site / 'adapter'}: kronecker precision of 4 tensors by kfac, ")
    assert lines[1].endswith(" tokens in 6 rows, scaled to N = 33")
    assert "row 6/6" in done.err
    assert (site / "adapter" / "precision.safetensors").exists()
    again = command("r.yaml")
    assert (again.code, again.out) == (2, "")
    assert "holds convergence.png, precision.safetensors, precision_report.json; replace the sidecar" in again.err
    quiet = command("r.yaml", "--overwrite", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_a_folder_on_the_command_line_wins(command: Command, site: Path) -> None:
    assert command("r.yaml", "out", "--quiet", "--set", "estimator=gram").code == 0
    assert sorted(path.name for path in (site / "out").iterdir()) == [
        "convergence.png",
        "precision.safetensors",
        "precision_report.json",
    ]
    assert not (site / "adapter" / "precision.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("precision_kfac", {}),
        ("precision_fisher", {"estimator": "fisher", "adapter": "null", "training_units": 5000, "max_memory": "10kB"}),
    ],
)
def test_the_plan(command: Command, site: Path, name: str, changes: dict[str, Any]) -> None:
    arguments = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    done = command("plan", "r.yaml", "out", *arguments)
    assert (done.code, done.err) == (0, "")
    check_golden(GOLDEN / "plans" / f"{name}.txt", done.out)
    assert not (site / "out").exists()


def test_the_plan_of_what_needs_no_data(command: Command, site: Path) -> None:
    (site / "r.yaml").write_text(
        "kind: precision\nmodel: base\nestimator: adam\noptimizer_state: run/checkpoint-10\n"
        "training_units: 5000\nbatch_size: 64\n"
    )
    check_golden(GOLDEN / "plans" / "precision_adam.txt", command("plan", "r.yaml", "out").out)


def test_a_plan_says_everything_that_is_wrong(command: Command, site: Path) -> None:
    shutil.rmtree(site / "adapter")
    (site / "rows.jsonl").unlink()
    (site / "out").write_text("a file")
    done = command("plan", "r.yaml", "out")
    assert (done.code, done.out) == (2, "")
    assert "rows.jsonl" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--threads", "2"), ("--max-memory", "1MB")])
def test_options_of_merges_are_refused(command: Command, site: Path, option: tuple[str, ...]) -> None:
    done = command("r.yaml", *option)
    assert (done.code, done.out) == (2, "")
    assert "recipes of kind `precision` have no use for it; the recipe has `max_memory`" in done.err


@pytest.mark.parametrize(
    ("estimator", "factors"),
    [
        ("kfac", "4 layers with input factor and output factor, 0 diagonals"),
        ("gram", "4 layers with input factor, 0 diagonals"),
        (
            "{name: kfac, eigenvalues: true}",
            "4 layers with input factor and output factor and eigenvalues, 0 diagonals",
        ),
    ],
)
def test_inspecting_factors(command: Command, site: Path, estimator: str, factors: str) -> None:
    assert command("r.yaml", "out", "--quiet", "--set", f"estimator={estimator}").code == 0
    done = command("inspect", "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("out/precision.safetensors: precision sidecar\n")
    facts = dict(line.strip().split(maxsplit=1) for line in done.out.splitlines())
    assert (facts["factors"], facts["family"], facts["space"]) == (factors, "kronecker", "product")
    listed = command("inspect", "out", "--tensors").out
    assert "    F32   1x16x16         model.layers.0.self_attn.q_proj.weight.input_factor" in listed
