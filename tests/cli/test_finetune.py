"""Recipes of kind `finetune` on the command line: what reaches the trainer, and what it has no use for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mergekit_bayes.errors import FinetuneError
from tests.cli.conftest import Command

RECIPE = """\
kind: finetune
model: org/base
adapter: {r: 4}
data: {train: train.jsonl}
"""


class FakeResult:
    """As `mergekit_bayes.finetune.run.FinetuneResult`."""

    def __init__(self, report: Mapping[str, object]) -> None:
        self.report = report

    def summary(self) -> str:
        return "trained"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replaces the trainer; records what it was given. `calls["raise"]` is raised by the run."""
    found: dict[str, Any] = {"raise": None, "report": {"x": 1}}

    def finetune(recipe: object, out: object, **options: object) -> FakeResult:
        found.update(recipe=recipe, out=out, options=options)
        if found["raise"] is not None:
            raise found["raise"]
        return FakeResult(found["report"])

    def describe(recipe: Any) -> str:
        return f"{recipe.model.path} to {recipe.output.path}"

    trainer = ModuleType("mergekit_bayes.finetune.run")  # the real one costs seconds to import
    trainer.finetune, trainer.describe = finetune, describe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return found


@pytest.mark.parametrize("arguments", [("r.yaml", "out"), ("run", "r.yaml", "out")])
def test_the_recipe_says_what_is_done(command: Command, calls: dict[str, Any], arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert (done.code, done.out, done.err) == (0, "trained\n", "")
    assert (calls["recipe"].model.path, calls["out"]) == ("org/base", Path("out"))
    assert calls["recipe"].folder == Path()
    assert calls["options"] == {"overwrite": False, "progress": True}


def test_options_reach_the_trainer(command: Command, calls: dict[str, Any]) -> None:
    done = command("r.yaml", "--overwrite", "-q", "--set", "output.path=here", "--set", "optimizer.lr=0.3")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert calls["options"] == {"overwrite": True, "progress": False}
    assert (calls["out"], calls["recipe"].output.path, calls["recipe"].optimizer.lr) == (None, "here", 0.3)


def test_a_process_that_does_not_lead_prints_nothing(command: Command, calls: dict[str, Any]) -> None:
    calls["report"] = {}
    assert command("r.yaml", "out").out == ""


def test_an_output_folder_is_needed(command: Command, calls: dict[str, Any]) -> None:
    done = command("r.yaml")
    expected = "r.yaml:1:1  output.path: missing; name a folder there, or after the recipe on the command line.\n"
    assert (done.code, done.out, done.err) == (2, "", expected)
    assert "recipe" not in calls


@pytest.mark.parametrize(
    "option",
    [("--device", "cuda"), ("--threads", "2"), ("--max-memory", "1GB"), ("--compile",), ("--no-compile",)],
)
def test_options_of_merges_are_refused(command: Command, calls: dict[str, Any], option: tuple[str, ...]) -> None:
    done = command("r.yaml", "out", *option)
    assert (done.code, done.out) == (2, "")
    assert f"'--{option[0].removeprefix('--').removeprefix('no-')}'" in done.err
    assert "recipes of kind `finetune` have no use for it; `accelerate launch` says where" in done.err
    assert "recipe" not in calls


def test_the_plan_is_the_trainers_own_description(command: Command, calls: dict[str, Any]) -> None:
    Path("p.yaml").write_text(RECIPE + "output: {path: there}\n")
    assert command("plan", "p.yaml").out == "org/base to there\n"
    assert command("plan", "p.yaml", "here").out == "org/base to here\n"
    refused = command("plan", "p.yaml", "--no-steps")
    assert (refused.code, refused.out) == (2, "")
    assert "'--steps'" in refused.err


def test_every_problem_of_a_recipe_is_printed(command: Command, calls: dict[str, Any]) -> None:
    Path("r.yaml").write_text(RECIPE + "learning_rate: 1e-4\ntraining: {epochs: 2}\n")
    done = command("r.yaml", "out")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "r.yaml:5:1  learning_rate: unknown key. Here it is `optimizer.lr`.\n"
        "r.yaml:6:12  training.epochs: unknown key. Here it is `training.num_train_epochs`.\n"
    )


def test_refusals_are_messages(command: Command, calls: dict[str, Any]) -> None:
    calls["raise"] = FinetuneError("train.jsonl: not there")
    done = command("r.yaml", "out")
    assert (done.code, done.out, done.err) == (2, "", "train.jsonl: not there\n")


def test_an_interrupted_run_says_how_to_go_on(command: Command, calls: dict[str, Any]) -> None:
    calls["raise"] = KeyboardInterrupt()
    done = command("r.yaml", "out")
    assert (done.code, done.out) == (130, "")
    assert "The same command continues from the last checkpoint" in done.err


def test_what_an_interrupt_says_itself_goes_first(command: Command, calls: dict[str, Any]) -> None:
    calls["raise"] = KeyboardInterrupt("stopped at step 7 of 9")
    done = command("r.yaml", "out")
    assert (done.code, done.err) == (130, "\nstopped at step 7 of 9\n")
