"""Evaluations on the command line: recipes of kind `evaluate`, their plans, and the verb without a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.conftest import TinyCheckpoints
from tests.finetune.runs import texts
from tests.golden.compare import GOLDEN, check_golden

RECIPE = """\
kind: evaluate
base_model: base
models: [base, {model: tuned, name: ours, samples: {count: 2}}]
data: {eval: rows.jsonl, max_length: 16}
intervals: {resamples: 100}
output: {path: scores}
"""


@pytest.fixture
def site(tiny_checkpoint: TinyCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an adapter with precisions, rows and a recipe, in the current folder."""
    from mergekit_bayes.recipe.adapter import AdapterSpec
    from tests.model.builders import load, trained, with_tokenizer

    monkeypatch.chdir(tmp_path)
    with_tokenizer(tiny_checkpoint("llama"), tmp_path / "base", pad=True)
    (tmp_path / "tuned").mkdir()
    trained(tmp_path / "tuned", load(tmp_path / "base", AdapterSpec(r=2, target_modules=("q_proj",))), seed=1)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts(8)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def test_a_recipe(command: Command, site: Path) -> None:
    done = command("r.yaml")
    assert done.code == 0, done.err
    assert "rows: 8 rows; second lines: difference from base, 95% interval" in done.out
    assert [line.split()[0] for line in done.out.splitlines() if line.startswith((" base", " ours"))] == [
        "base",
        "ours",
        "ours",
    ]
    assert done.out.splitlines()[-1] == f"{site / 'scores'}: results.json, rows, figures"
    assert "ours (2 samples): from row 16 of 24" in done.err
    names = ["evaluate_recipe.yaml", "results.json", "rows", "scores.png"]
    assert sorted(path.name for path in (site / "scores").iterdir()) == names
    assert command("r.yaml").code == 2
    again = command("r.yaml", "--overwrite", "--quiet")
    assert (again.code, again.out, again.err) == (0, "", "")


def test_questions(command: Command, site: Path) -> None:
    asked = [{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": letter} for letter in "ABA"]
    (site / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    done = command("evaluate", "base", "--data", "asked.jsonl", "--task", "multiple_choice")
    assert done.code == 0, done.err
    assert "asked: 3 rows" in done.out
    assert "accuracy per byte" in done.out
    done = command("evaluate", "base", "--data", "asked.jsonl")
    assert done.code == 2
    assert "multiple-choice questions are evaluated with `task: multiple_choice`" in done.err


def test_the_recipe_in_the_output_is_the_same_one(command: Command, site: Path) -> None:
    assert command("r.yaml", "-q").code == 0
    assert command("scores/evaluate_recipe.yaml", "again", "-q").code == 0
    assert (site / "again" / "results.json").read_bytes() == (site / "scores" / "results.json").read_bytes()


def test_the_plan(command: Command, site: Path) -> None:
    done = command("plan", "r.yaml")
    assert (done.code, done.err) == (0, "")
    check_golden(GOLDEN / "plans" / "evaluate.txt", done.out)
    assert not (site / "scores").exists()


def test_a_plan_says_everything_that_is_wrong(command: Command, site: Path) -> None:
    (site / "rows.jsonl").unlink()
    (site / "scores").write_text("a file")
    (site / "tuned" / "precision.safetensors").unlink()
    done = command("plan", "r.yaml")
    assert (done.code, done.out) == (2, "")
    lines = done.err.splitlines()
    assert [any(word in line for line in lines) for word in ("ours: has no precision", "rows.jsonl", "scores")] == [
        True
    ] * 3


def test_without_a_recipe(command: Command, site: Path) -> None:
    done = command("evaluate", "base", "ours=tuned", "--data", "rows.jsonl", "--max-rows", "5", "--metric", "loss")
    assert done.code == 0, done.err
    assert done.out.startswith("rows: 5 rows; second lines: difference from base, 95% interval")
    assert "perplexity" not in done.out
    assert sorted(path.name for path in site.iterdir()) == ["base", "r.yaml", "rows.jsonl", "tuned"]


def test_a_merge_recipe_stands_for_its_merge(command: Command, site: Path) -> None:
    (site / "merge.yaml").write_text("merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: tuned}]\n")
    with (site / "merge.yaml").open("a") as file:
        file.write("parameters: {weight: 1.0}\n")
    done = command("evaluate", "tuned", "alone=merge.yaml", "--data", "rows.jsonl", "--out", "scores", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    found = json.loads((site / "scores" / "results.json").read_text())["scores"]
    assert found["alone"]["rows"]["loss"]["value"] == pytest.approx(found["tuned"]["rows"]["loss"]["value"], rel=1e-6)
    assert sorted(path.name for path in site.iterdir()) == [
        "base",
        "merge.yaml",
        "r.yaml",
        "rows.jsonl",
        "scores",
        "tuned",
    ]


def test_options_are_those_of_a_recipe(command: Command, site: Path) -> None:
    options = ["--samples", "2", "--temperature", "validation", "--validation", "rows.jsonl", "--prune", "0.5"]
    options += ["--max-length", "16", "--packing", "--batch-size", "2", "--seed", "3", "--base-model", "base"]
    options += ["--prior", "50"]
    done = command("evaluate", "tuned", "--data", "rows.jsonl", "--out", "scores", "-q", *options)
    assert (done.code, done.out, done.err) == (0, "", "")
    results = json.loads((site / "scores" / "results.json").read_text())
    assert [*results["scores"]] == ["tuned", "tuned (2 samples)", "tuned (pruned 0.5)"]
    assert results["seed"] == 3
    assert [model.get("prior") for model in results["models"].values()] == [None, 50, None]
    assert command("scores/evaluate_recipe.yaml", "again", "-q").code == 0
    assert (site / "again" / "results.json").read_bytes() == (site / "scores" / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "--data", "nothing.jsonl"], "nothing.jsonl"),
        (["nothing", "--data", "rows.jsonl"], "nothing: "),
        (["base", "--data", "rows.jsonl", "--samples", "2"], "has no precision sidecar, which `samples` needs"),
        (["base", "--data", "rows.jsonl", "--metric", "brier"], "models of `causal_lm` have no brier"),
        (["base", "--data", "rows.jsonl", "--temperature", "hot"], 'expected a number or `validation`, found "hot"'),
        (["nothing.yaml", "--data", "rows.jsonl"], "there is no nothing.yaml; expected the path of a merge recipe"),
        (["base", "--lm-eval", "a", "--include-path", "nowhere"], "include_path: there is no folder nowhere; expected"),
        (["base", "--lm-eval", "a", "--limit", "-1"], "lm_eval.limit: expected a number above zero, found -1"),
        (["base", "base", "--data", "rows.jsonl"], "has the name of `models[0]`"),
        (["r.yaml", "--data", "rows.jsonl"], "expected a recipe of kind `merge`, found `evaluate`"),
    ],
)
def test_bad_input(command: Command, site: Path, arguments: list[str], message: str) -> None:
    done = command("evaluate", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


def test_options_of_merges_are_refused(command: Command, site: Path) -> None:
    done = command("r.yaml", "--threads", "2")
    assert done.code == 2
    assert "recipes of kind `evaluate` have no use for it" in done.err


def test_tasks_of_the_harness(command: Command, site: Path) -> None:
    pytest.importorskip("lm_eval")
    from tests.harness_tasks import write_tasks

    write_tasks(site / "tasks")
    options = ["--lm-eval", "pick", "--include-path", "tasks", "--limit", "4", "--num-fewshot", "1"]
    done = command("evaluate", "base", "ours=tuned", *options)
    assert done.code == 0, done.err
    assert done.out.startswith("lm-eval-harness ")
    assert [line.split()[:2] for line in done.out.splitlines() if line.split()[:1] == ["pick"]] == [
        ["pick", "acc"],
        ["pick", "acc_norm"],
    ]
    assert "base: pick: from row 0 of 8" in done.err
    nothing = command("evaluate", "base")
    assert (nothing.code, nothing.out) == (2, "")
    assert "data: missing; name the rows to evaluate on" in nothing.err
