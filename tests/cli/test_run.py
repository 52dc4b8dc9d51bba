"""The default verb: how arguments reach the library, and what comes back as an exit code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import OutputError, PlanError
from tests.cli.conftest import Command

RECIPE = """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
"""


class FakeResult:
    """As `mergekit_bayes.merge.run.MergeResult`."""

    def __init__(self, report: Mapping[str, object]) -> None:
        self.report = report

    def summary(self) -> str:
        return "merged"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replaces planning and running; records what they were given. `calls["raise"]` is raised by the run."""
    found: dict[str, Any] = {"raise": None, "report": {"x": 1}}

    def plan_merge(recipe: object, out: object, *, recipe_dir: object) -> str:
        found.update(recipe=recipe, out=out, recipe_dir=recipe_dir)
        return "the plan"

    def run_merge(plan: object, **options: object) -> FakeResult:
        found.update(plan=plan, options=options)
        if found["raise"] is not None:
            raise found["raise"]
        return FakeResult(found["report"])

    monkeypatch.setattr("mergekit_bayes.merge.plan.plan_merge", plan_merge)
    monkeypatch.setattr("mergekit_bayes.merge.run.run_merge", run_merge)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return found


@pytest.mark.parametrize("arguments", [("r.yaml", "out"), ("run", "r.yaml", "out"), ("--quiet", "r.yaml", "out")])
def test_the_first_word_may_be_the_recipe(command: Command, calls: dict[str, Any], arguments: tuple[str, ...]) -> None:
    assert command(*arguments).code == 0
    assert calls["recipe"].merge_method == "linear"
    assert (calls["out"], calls["recipe_dir"], calls["plan"]) == (Path("out"), Path(), "the plan")


def test_the_result_is_printed(command: Command, calls: dict[str, Any]) -> None:
    done = command("r.yaml", "out")
    assert (done.code, done.out, done.err) == (0, "merged\n", "")


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_prints_nothing(command: Command, calls: dict[str, Any], flag: str) -> None:
    done = command("r.yaml", "out", flag)
    assert (done.out, done.err) == ("", "")
    assert calls["options"]["progress"] is False


def test_a_process_that_does_not_lead_prints_nothing(command: Command, calls: dict[str, Any]) -> None:
    calls["report"] = {}
    assert command("r.yaml", "out").out == ""


def test_options_have_defaults_that_let_the_library_choose(command: Command, calls: dict[str, Any]) -> None:
    command("r.yaml", "out")
    assert calls["options"] == {"overwrite": False, "progress": False}  # no bar where standard error is no terminal


@pytest.mark.parametrize(
    ("arguments", "option", "value"),
    [
        (["--overwrite"], "overwrite", True),
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--threads", "3"], "threads", 3),
        (["--max-memory", "512MB"], "max_memory", 512_000_000),
        (["--max-memory", "2GiB"], "max_memory", 2**31),
        (["--max-memory", "1000000"], "max_memory", 1_000_000),
        (["--compile"], "compile", True),
        (["--no-compile"], "compile", False),
    ],
)
def test_options_reach_the_library(
    command: Command, calls: dict[str, Any], arguments: list[str], option: str, value: object
) -> None:
    assert command("r.yaml", "out", *arguments).code == 0
    assert calls["options"][option] == value


def test_set_changes_the_recipe(command: Command, calls: dict[str, Any]) -> None:
    changes = ["--set", "models[0].parameters.weight=0.25", "--set", "output.path=here"]
    assert command("r.yaml", *changes).code == 0
    assert calls["recipe"].models[0].parameters["weight"] == 0.25
    assert calls["out"] is None
    assert calls["recipe"].output.path == "here"


def test_an_output_folder_is_needed(command: Command, calls: dict[str, Any]) -> None:
    done = command("r.yaml")
    expected = "r.yaml:1:1  output.path: missing; name a folder there, or after the recipe on the command line.\n"
    assert (done.code, done.out, done.err) == (2, "", expected)
    assert "plan" not in calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yaml", "out", "--threads", "0"], "--threads"),
        (["r.yaml", "out", "--max-memory", "many"], 'found "many"'),
        (["r.yaml", "out", "--overwrit"], "--overwrit"),
        (["r.yaml", "out", "extra"], "extra"),
        (["run"], "recipe"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_wrong_command_line_is_refused(
    command: Command, calls: dict[str, Any], arguments: list[str], message: str
) -> None:
    done = command(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""
    assert "plan" not in calls


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("plna", "plna: no such recipe. Did you mean `bayes-merge plan`?\n"),
        ("inspct", "inspct: no such recipe. Did you mean `bayes-merge inspect`?\n"),
        ("merge", "merge: no such recipe. The recipe itself says its kind: `bayes-merge RECIPE [OUT]`.\n"),
        ("finetune", "finetune: no such recipe. The recipe itself says its kind: `bayes-merge RECIPE [OUT]`.\n"),
        ("none.yaml", "none.yaml: cannot read the recipe: No such file or directory\n"),
    ],
)
def test_a_misspelt_verb_is_no_recipe(command: Command, calls: dict[str, Any], word: str, message: str) -> None:
    done = command(word, "r.yaml")
    assert (done.code, done.out, done.err) == (2, "", message)


def test_a_recipe_may_be_called_like_a_verb(command: Command, calls: dict[str, Any]) -> None:
    Path("plans").write_text(RECIPE)
    assert command("plans", "out").code == 0


def test_every_problem_of_a_recipe_is_printed(command: Command, calls: dict[str, Any]) -> None:
    Path("r.yaml").write_text(RECIPE + "dtype: bf16\nsede: 1\n")
    done = command("r.yaml", "out")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        'r.yaml:5:8  dtype: expected `bfloat16`, `float16`, `float32` or `float64`, found "bf16".'
        " Did you mean `bfloat16`?\n"
        "r.yaml:6:1  sede: unknown key. Did you mean `seed`?\n"
    )


@pytest.mark.parametrize("error", [OutputError("out: not empty"), PlanError([OutputError("a"), OutputError("b")])])
def test_refusals_are_messages(command: Command, calls: dict[str, Any], error: Exception) -> None:
    calls["raise"] = error
    done = command("r.yaml", "out")
    assert (done.code, done.out, done.err) == (2, "", f"{error}\n")


def test_an_interrupted_merge_says_how_to_go_on(command: Command, calls: dict[str, Any]) -> None:
    calls["raise"] = KeyboardInterrupt()
    done = command("r.yaml", "out")
    assert done.code == 130
    assert "The same command continues" in done.err


def test_a_bug_keeps_its_traceback(calls: dict[str, Any]) -> None:
    from mergekit_bayes.cli.main import main

    calls["raise"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["r.yaml", "out"])
