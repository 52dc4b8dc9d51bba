"""Tasks of lm-eval-harness in previews: what a mix scores is what an evaluation of its merge says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import PlanError, RecipeError
from mergekit_bayes.evaluate.run import evaluate
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.predict.harness import HarnessTask
from mergekit_bayes.preview.run import preview
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe
from tests.harness_tasks import write_tasks
from tests.preview.conftest import TABLES, Recipes

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def previewed(recipe: Recipes, tasks: Path, **keys: Any) -> dict[str, Any]:
    """One task of rows, one of text that is read, one of questions."""
    shared = {"include_path": str(tasks), "limit": 6}
    asked = [
        {"name": "rows", "data": "task 1"},
        {"name": "read", "lm_eval": {"tasks": "read", **shared}, "metric": "bits_per_byte"},
        {"name": "pick", "lm_eval": {"tasks": ["pick"], **shared, "num_fewshot": 1}},
    ]
    return recipe(sources=3, tasks=asked, fidelity="evaluated", **{"design": {"partitions": 1}, **keys})


def test_scores_are_those_of_an_evaluation(recipe: Recipes, tasks: Path, tmp_path: Path) -> None:
    content = previewed(recipe, tasks, design={"kind": "list", "weights": [[0.75, 0.5, 0.25]]})
    result = preview(content, tmp_path / "out", tables=TABLES)
    about = {task["name"]: (task["metric"], task["better"]) for task in result.front["tasks"]}
    assert about == {"rows": ("loss", "lower"), "read": ("bits_per_byte", "lower"), "pick": ("acc", "higher")}
    (point,) = (point for point in result.front["points"] if point["weights"] == [0.75, 0.5, 0.25])
    loaded = load_recipe(content, expect=PreviewRecipe, methods=method_schemas())
    merge = loaded.merge_of(loaded.compared[0], [0.75, 0.5, 0.25])
    for name, metric in (("read", "bits_per_byte"), ("pick", "acc")):
        asked = content["tasks"][1 if name == "read" else 2]["lm_eval"]
        alone = {"kind": "evaluate", "models": [{"name": "mix", "merge": merge}], "lm_eval": asked, "batch_size": 4}
        found = evaluate(alone).results["lm_eval"]["mix"][name][metric]["value"]
        assert point["evaluated"]["scores"][name] == pytest.approx(found, rel=1e-6)
    on_rows = evaluate({"kind": "evaluate", "models": alone["models"], "data": "task 1"}, tables=TABLES)
    assert point["evaluated"]["scores"]["rows"] == pytest.approx(on_rows.value("mix", "task 1", "loss"), rel=1e-5)


def test_what_was_asked_once_is_known(
    recipe: Recipes, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = HarnessTask.run

    def watched(self: HarnessTask, *arguments: Any, **options: Any) -> Any:
        asked.append(self.name)
        return original(self, *arguments, **options)

    monkeypatch.setattr(HarnessTask, "run", watched)
    content = previewed(recipe, tasks)
    first = preview(content, tmp_path / "out", tables=TABLES).front
    count = len(asked)
    assert sorted(set(asked)) == ["pick", "read"]
    again = preview(tmp_path / "out" / "preview_recipe.yaml", tmp_path / "out", tables=TABLES).front
    assert [point["evaluated"] for point in again["points"]] == [point["evaluated"] for point in first["points"]]
    assert len(asked) == count
    for task in content["tasks"][1:]:
        task["lm_eval"]["limit"] = 5
    preview(content, tmp_path / "out", tables=TABLES)
    assert len(asked) == 2 * count


def refusal_of(content: dict[str, Any], kind: type[Exception], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        preview(content, "out", tables=TABLES, **options)
    return str(caught.value)


def test_metrics_and_tasks_that_are_not_there(recipe: Recipes, tasks: Path, tmp_path: Path) -> None:
    content = previewed(recipe, tasks)
    content["tasks"][1]["metric"] = "f1"
    text = (tasks / "pick.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("questions.jsonl", "gone.jsonl").replace("task: pick", "task: bad"))
    (tmp_path / "odd.yaml").write_text(text.replace("task: pick", "task: odd").replace("acc,", "f1,"))
    found = refusal_of(content, PlanError)
    assert "task read: tasks[1].metric: f1 is none of byte_perplexity, bits_per_byte." in found
    assert "task pick: tasks" not in found
    content = previewed(recipe, tasks)
    refused = refusal_of(content, RecipeError, evaluators={"read": lambda _: 0.0})
    assert refused == "evaluators: read is a task of lm-eval-harness; keep one of the two"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"lm_eval": "a", "data": "b"}, "tasks[0].lm_eval: beside `data`; keep one of them."),
        ({"lm_eval": "a", "max_rows": 3}, "tasks[0].max_rows: is about rows; write `lm_eval: {limit: ...}`."),
        ({"lm_eval": ["a", "b"]}, "tasks[0].lm_eval: expected one task of lm-eval-harness, found a list;"),
        ({}, "tasks[0].data: missing"),
        ({"data": "b", "metric": "acc_norm"}, "tasks[0].metric: expected `loss`, `perplexity` or `accuracy`"),
    ],
)
def test_recipes_that_are_refused(recipe: Recipes, task: dict[str, Any], message: str) -> None:
    content = recipe(tasks=[{"name": "x", **task}, {"name": "y", "data": "b"}])
    with pytest.raises(RecipeError) as caught:
        load_recipe(content, methods=method_schemas())
    assert any(problem.startswith(message) for problem in caught.value.problems), caught.value.problems


def test_a_resolved_recipe_reads_back(recipe: Recipes) -> None:
    content = recipe(
        tasks=[{"name": "x", "lm_eval": "a"}, {"name": "y", "lm_eval": "b", "metric": "f1", "better": "higher"}]
    )
    loaded = load_recipe(content, expect=PreviewRecipe, methods=method_schemas())
    assert [task.metric for task in loaded.tasks] == ["first", "f1"]
    assert load_recipe(loaded.resolved(), methods=method_schemas()) == loaded


def test_classifiers_are_refused(recipe: Recipes) -> None:
    content = recipe(
        tasks=[{"name": "x", "lm_eval": "a"}, {"name": "y", "data": "b"}],
        evaluation={"task": "sequence_classification"},
    )
    with pytest.raises(RecipeError, match="tasks of the harness are put to language models"):
        load_recipe(content, methods=method_schemas())
