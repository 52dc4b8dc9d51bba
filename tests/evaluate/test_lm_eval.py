"""Tasks of lm-eval-harness in evaluations: every kind of model, known again, beside rows or alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import EvaluateError, MergekitBayesError, RecipeError
from mergekit_bayes.evaluate.describe import describe
from mergekit_bayes.evaluate.table import print_results
from mergekit_bayes.merge.run import merge
from mergekit_bayes.predict.harness import HarnessTask
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.evaluate import EvaluateRecipe
from mergekit_bayes.recipe.harness import HarnessSpec
from tests.evaluate.runs import recipe, run
from tests.harness_tasks import write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


class Asked(list[tuple[str, str]]):
    """Which model was put to which task; fails before number `at`."""

    at: int | None = None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found, original = Asked(), HarnessTask.run

    def watched(self: HarnessTask, *arguments: Any, title: str, **options: Any) -> Any:
        if len(found) == found.at:
            raise KeyboardInterrupt
        found.append((title, self.name))
        return original(self, *arguments, title=title, **options)

    monkeypatch.setattr(HarnessTask, "run", watched)
    return found


def three(llama: Path, tuned: Path) -> list[dict[str, Any]]:
    """A base, an adapter, and a merge that is nowhere on disk."""
    source = {"model": str(tuned), "parameters": {"weight": 20.0}}
    content = {"merge_method": "task_arithmetic", "base_model": str(llama), "models": [source]}
    return [
        {"name": "base", "model": str(llama)},
        {"name": "tuned", "model": str(tuned)},
        {"name": "merged", "merge": content},
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_kind_of_model(
    llama: Path, tuned: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = three(llama, tuned)
    merge(models[2]["merge"], tmp_path / "merged")
    models.append({"name": "on disk", "model": str(tmp_path / "merged")})
    harness = {"tasks": ["pick", "read"], "include_path": str(tasks)}
    result = run(recipe(models, lm_eval=harness), tmp_path / "out")
    found = result.results["lm_eval"]
    assert list(found) == ["base", "tuned", "merged", "on disk"]
    for task, metrics in found["on disk"].items():
        for name, score in metrics.items():
            assert found["merged"][task][name]["value"] == pytest.approx(score["value"], rel=1e-6)
    bits = [found[title]["read"]["bits_per_byte"]["value"] for title in ("base", "tuned", "merged")]
    assert len(set(bits)) == 3
    assert found["base"]["pick"]["acc"].keys() == {"value", "stderr", "higher_is_better"}
    assert result.results["lm_eval_tasks"] == {"pick": {"documents": 10}, "read": {"documents": 10}}
    assert set(result.results["scores"]) == set(found), "rows are looked at as well"
    on_disk = json.loads((tmp_path / "out" / "results.json").read_text())
    assert on_disk["lm_eval"] == json.loads(json.dumps(found))
    print_results(result.results)
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.split()[:2] == ["read", "bits_per_byte"])
    assert row[2:] == ["↓", *(f"{value:.4f}" for value in (*bits, bits[2]))]
    assert f"{found['base']['pick']['acc']['value']:.4f} ± {found['base']['pick']['acc']['stderr']:.4f}" in printed


def test_alone_and_known_again_task_by_task(
    llama: Path, tuned: Path, tasks: Path, tmp_path: Path, asked: Asked
) -> None:
    models = three(llama, tuned)

    def evaluated(names: list[str], out: str, **keys: Any) -> None:
        spec = {"tasks": names, "include_path": str(tasks), **keys}
        run({"kind": "evaluate", "models": models, "lm_eval": spec}, tmp_path / out, overwrite=True)

    evaluated(["pick", "read"], "whole")
    whole = [(title, name) for title in ("base", "tuned", "merged") for name in ("pick", "read")]
    assert asked == whole
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "evaluate_recipe.yaml",
        "lm_eval.jsonl",
        "results.json",
    ]
    asked.clear()
    asked.at = 3
    with pytest.raises(KeyboardInterrupt):
        evaluated(["pick", "read"], "cut")
    asked.at = None
    evaluated(["pick", "read"], "cut")
    assert asked == whole, "no task was asked twice"
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    asked.clear()
    evaluated(["read", "pick"], "cut")
    assert asked == []
    evaluated(["continue", "read"], "cut")
    assert [name for _, name in asked] == ["continue"] * 3
    asked.clear()
    evaluated(["read"], "cut", limit=2)
    assert len(asked) == 3


def test_the_recipe_in_the_output_is_the_same_one(llama: Path, tuned: Path, tasks: Path, tmp_path: Path) -> None:
    spec = {"tasks": "pick", "include_path": str(tasks), "limit": 3, "num_fewshot": 1}
    run({"kind": "evaluate", "models": three(llama, tuned), "lm_eval": spec}, tmp_path / "out")
    run(tmp_path / "out" / "evaluate_recipe.yaml", tmp_path / "again")  # type: ignore[arg-type]
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_classifiers_are_refused(bert: Path, tasks: Path) -> None:
    spec = {"tasks": "pick", "include_path": str(tasks)}
    with pytest.raises(EvaluateError, match="lm_eval: tasks of the harness are put to language models"):
        run(recipe([bert], data="labelled", lm_eval=spec))


def test_nothing_is_written_when_the_harness_fails(llama: Path, tasks: Path, tmp_path: Path) -> None:
    text = (tasks / "pick.yaml").read_text().replace("task: pick", "task: odd")
    (tmp_path / "odd.yaml").write_text(text.replace("{{question}}", "{{nothing.at.all if label == 2 else question}}"))
    spec = {"tasks": "odd", "include_path": str(tmp_path)}
    with pytest.raises(MergekitBayesError, match=f"model {llama}: lm_eval task odd: UndefinedError"):
        run(recipe([llama], lm_eval=spec), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plan(llama: Path, tasks: Path) -> None:
    spec = {"tasks": ["pick", "read"], "include_path": str(tasks), "limit": 5}
    loaded = load_recipe({"kind": "evaluate", "models": str(llama), "lm_eval": spec}, expect=EvaluateRecipe)
    assert f"lm_eval pick, read; limit 5; task files in {tasks}\n" in describe(loaded)


def test_without_rows_there_is_no_loss_to_compare(llama: Path, tuned: Path, tasks: Path, tmp_path: Path) -> None:
    from mergekit_bayes.evaluate.measured import compare_with
    from mergekit_bayes.merge.diagnosis import read_diagnosis

    source = {"model": str(tuned), "parameters": {"weight": 1.0}}
    content = {"merge_method": "posterior", "base_model": str(llama), "models": [source], "space": "full"}
    merge({**content, "precision": {"prior": 1.0}}, tmp_path / "merged")
    spec = {"tasks": "pick", "include_path": str(tasks), "limit": 2}
    run({"kind": "evaluate", "models": str(tmp_path / "merged"), "lm_eval": spec}, tmp_path / "out")
    with pytest.raises(EvaluateError, match="has no loss of"):
        compare_with(read_diagnosis(tmp_path / "merged"), tmp_path / "out")


def test_recipes() -> None:
    short = load_recipe({"models": ["a"], "kind": "evaluate", "lm_eval": ["x", "y"]}, expect=EvaluateRecipe)
    assert short.lm_eval == HarnessSpec(tasks=("x", "y"))
    assert load_recipe(short.resolved(), expect=EvaluateRecipe) == short


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "data: missing; name the rows to evaluate on, such as `data: held_out.jsonl`, or tasks of `lm_eval`."),
        ({"lm_eval": "a", "samples": 2}, "samples: is about the rows of `data`, and there are none; remove it."),
        (
            {"lm_eval": "a", "task": "sequence_classification"},
            "lm_eval: tasks of the harness are put to language models",
        ),
        ({"lm_eval": {"num_fewshot": 2}}, "lm_eval.tasks: missing; name tasks of lm-eval-harness"),
        ({"lm_eval": {"tasks": ["a", "a"]}}, 'lm_eval.tasks: names "a" twice.'),
        ({"lm_eval": {"tasks": "a", "limit": 2.5}}, "lm_eval.limit: expected a whole number of documents, or a share"),
        ({"lm_eval": {"tasks": "a", "fewshots": 2}}, "lm_eval.fewshots: unknown key."),
        ({"lm_eval": 3}, "lm_eval: expected a task, a list of tasks or a mapping with `tasks`, found 3."),
    ],
)
def test_recipes_that_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"kind": "evaluate", "models": "a", **keys})
    assert any(problem.startswith(message) for problem in caught.value.problems), caught.value.problems
