"""`bayes-merge diagnose`: from a merge of adapters, and its evaluation, to what is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.conftest import TinyCheckpoints
from tests.finetune.runs import texts

MERGE = """\
merge_method: posterior
base_model: base
models:
  - {model: tuned/code, parameters: {weight: 0.5}}
  - {model: tuned/docs, parameters: {weight: 0.5}}
space: full
precision: {prior: 0.001}
"""


@pytest.fixture
def site(tiny_checkpoint: TinyCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge of two adapters with precisions, and rows of both tasks, in the current folder."""
    from mergekit_bayes import merge
    from mergekit_bayes.recipe.adapter import AdapterSpec
    from tests.model.builders import load, trained, with_tokenizer

    monkeypatch.chdir(tmp_path)
    with_tokenizer(tiny_checkpoint("llama"), tmp_path / "base", pad=True)
    for seed, name in enumerate(("code", "docs")):
        (tmp_path / "tuned" / name).mkdir(parents=True)
        spec = AdapterSpec(r=2, target_modules=("q_proj",))
        trained(tmp_path / "tuned" / name, load(tmp_path / "base", spec), seed=seed)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(4, seed=seed)))
    (tmp_path / "merge.yaml").write_text(MERGE)
    merge("merge.yaml", "merged")
    return tmp_path


def test_costs_and_conflicts(command: Command, site: Path) -> None:
    done = command("diagnose", "merged", "--top", "1")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "merged: predicted loss increase by posterior"
    assert re.fullmatch(
        r"  tuned/code: \S+ nats per training unit, \S+ nats in all, most in model\.layers\.\d\S+ \(\d+%\)", lines[1]
    )
    assert lines[3] == "tensors that conflict most, nats per training unit:"
    assert re.fullmatch(r"  model\.layers\.\d\S+: \S+ \(\S+%\): code \S+, docs \S+", lines[4])
    assert lines[5:] == ["heat map: merged/mismatch.png"]
    assert (site / "merged" / "mismatch.png").read_bytes().startswith(b"\x89PNG")


def test_beside_what_was_measured(command: Command, site: Path) -> None:
    models = ["evaluate", "merged", "tuned/code", "tuned/docs", "--base-model", "base"]
    assert command(*models, "--data", "code.jsonl", "--data", "docs.jsonl", "--out", "scores", "-q").code == 0
    done = command("diagnose", "merged", "--results", "scores", "--figure", "map.png", "--top", "0")
    assert (done.code, done.err) == (0, "")
    assert "tensors that conflict" not in done.out
    scores = json.loads((site / "scores" / "results.json").read_text())["scores"]
    for name in ("code", "docs"):
        gain = scores["merged"][name]["loss"]["value"] - scores[f"tuned/{name}"][name]["loss"]["value"]
        assert re.search(rf"  tuned/{name} on {name}: predicted \S+, measured {gain:.4f}$", done.out, re.MULTILINE)
    assert (site / "map.png").exists()
    swapped = command("diagnose", "merged", "--results", "scores", "--task", "tuned/code=docs", "--top", "0")
    assert "tuned/code on docs" in swapped.out


def test_what_richer_posteriors_would_remove(command: Command, site: Path) -> None:
    done = command("diagnose", "merged", "--families", "--top", "0")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    at = lines.index("merges by poorer and richer posteriors, judged by the diagonal ones, nats per training unit:")
    assert re.fullmatch(r"  isotropic: \S+ in all: code \S+, docs \S+", lines[at + 1])
    assert re.fullmatch(r"  diagonal: \S+ in all, \d+% (less|more) than isotropic: code \S+, docs \S+", lines[at + 2])
    assert lines[at + 3].startswith("  this merge (posterior): ")
    assert lines[at + 4] == "families: merged/families.png"
    assert (site / "merged" / "families.png").read_bytes().startswith(b"\x89PNG")


def test_a_recipe_before_it_is_run(command: Command, site: Path) -> None:
    done = command("diagnose", "merge.yaml")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("merges by poorer and richer posteriors, judged by the diagonal ones")
    assert command("diagnose", "merge.yaml", "--figure", "what_if.png").out.endswith("families: what_if.png\n")
    assert (site / "what_if.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge.yaml", "--results", "base"], "a recipe has no merge to compare with"),
        (["base"], "holds no report of a merge; expected the output of a merge, with merge_report.json"),
        (["nothing"], "holds no report of a merge"),
        (["merged", "--results", "base"], "holds no results of an evaluation"),
        (["merged", "--results", "base", "--task", "code"], "expected SOURCE=DATA, found code"),
    ],
)
def test_bad_input(command: Command, site: Path, arguments: list[str], message: str) -> None:
    done = command("diagnose", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert not (site / "merged" / "mismatch.png").exists()
