"""The evaluation recipe: shorthands, defaults, and what belongs together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import dump_yaml, load_recipe
from mergekit_bayes.recipe.evaluate import EvaluateRecipe, SamplesSpec


def load(**keys: Any) -> EvaluateRecipe:
    return load_recipe({"kind": "evaluate", "models": "tuned", "data": "a.jsonl", **keys}, expect=EvaluateRecipe)


def problems_of(**keys: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load(**keys)
    return caught.value.problems


def test_one_model_and_one_file_are_enough() -> None:
    recipe = load()
    assert [model.title for model in recipe.models] == ["tuned"]
    assert [entry.path for entry in recipe.data.eval] == ["a.jsonl"]
    assert (recipe.baseline_title, recipe.samples_of(recipe.models[0]), recipe.metrics) == ("tuned", None, None)


def test_short_forms_are_those_written_out() -> None:
    short = load(models=["base", {"model": {"model": "base", "lora": "tuned"}}], samples=4, prune=0.5, metrics="ece")
    written = load(
        models=[{"model": "base"}, {"model": "base+tuned"}], samples={"count": 4}, prune=[0.5], metrics=["ece"]
    )
    assert short == written


def test_samples_of_one_model() -> None:
    models = ["base", {"model": "a", "samples": False}, {"model": "b", "samples": {"count": 2, "temperature": 0.5}}]
    recipe = load(models=models, samples=8)
    found = [recipe.samples_of(model) for model in recipe.models]
    assert found == [SamplesSpec(count=8, temperature=1.0), None, SamplesSpec(count=2, temperature=0.5)]


def test_a_resolved_recipe_reads_back() -> None:
    recipe = load(
        models=["base", {"model": "tuned", "name": "ours", "precision": "sidecar", "samples": False}],
        samples={"count": 2, "temperature": "validation"},
        validation={"eval": "b.jsonl", "max_length": 64},
        prune=[0.5, 0.25],
        baseline="ours",
        metrics=["accuracy", "selective_accuracy"],
        coverage=[0.9, 0.5],
    )
    assert load_recipe(recipe.resolved(), expect=EvaluateRecipe) == recipe
    some = load(metrics=["loss"])
    assert load_recipe(some.resolved(), expect=EvaluateRecipe) == some
    merge = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 0.5}}]}
    merged = load(models=["base", {"merge": "merge.yaml"}, {"name": "mine", "merge": merge, "samples": False}])
    assert load_recipe(merged.resolved(), expect=EvaluateRecipe) == merged
    assert [model.title for model in merged.models] == ["base", "merge.yaml", "mine"]
    assert (recipe.prune, recipe.coverage) == ((0.25, 0.5), (0.5, 0.9))


def test_data_of_questions(tmp_path: Path) -> None:
    columns = {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"}
    entry = {"path": "piqa", "format": "multiple_choice", "columns": columns, "separator": ""}
    recipe = load(data={"eval": entry}, metrics=["normalised_accuracy", "selective_accuracy"])
    assert recipe.told_task == "multiple_choice"
    assert recipe.data is not None
    (found,) = recipe.data.eval
    assert found.columns["choices"] == ("sol1", "sol2")
    assert recipe.resolved()["data"] == {
        "eval": [{"path": "piqa", "split": "train", **entry}],
        "max_length": 1024,
        "long_rows": "truncate",
        "packing": False,
    }
    assert load_recipe(recipe.resolved(), expect=EvaluateRecipe) == recipe
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.resolved()))
    assert load_recipe(tmp_path / "recipe.yaml", expect=EvaluateRecipe) == recipe
    assert (load(task="multiple_choice").told_task, load().told_task) == ("multiple_choice", None)
    assert load(task="causal_lm", data={"eval": entry}).told_task == "causal_lm"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"models": ["a", {"model": "b", "name": "a"}]}, "models[1]: has the name of `models[0]`; give it a"),
        ({"baseline": "tunde"}, "baseline: is the name of no model. Did you mean `tuned`?"),
        ({"samples": {"temperature": "validation"}}, "samples.temperature: is chosen on the rows of `validation`"),
        ({"validation": "b.jsonl"}, "validation: has no effect"),
        ({"task": "causal_lm", "metrics": ["brier"]}, "metrics[0]: `brier` is none of `causal_lm`; those are `loss`"),
        ({"metrics": ["brier", "loss"]}, "metrics: belong to several tasks"),
        ({"metrics": "loss", "coverage": 0.5}, "coverage: has no effect without `selective_accuracy`"),
        ({"data": {"eval": {"path": "a", "weight": 1}}}, "data.eval.weight: is of training mixtures"),
        (
            {"models": [{"name": "a"}]},
            "models[0].model: missing; every entry names a `model`, or the recipe of a `merge`",
        ),
        ({"models": [{"model": "a", "merge": "b.yaml"}]}, "models[0].merge: beside a `model`; keep one of them."),
        ({"models": [{"merge": {"models": []}}]}, "models[0].name: missing; say what tables call this merge."),
        ({"models": [{"merge": ["a"]}]}, "models[0].merge: expected the path of a merge recipe, or the recipe itself"),
        (
            {"models": [{"merge": "a", "base_model": "b"}]},
            "models[0].base_model: has no effect; the recipe of the merge",
        ),
        ({"models": [{"merge": "a.yaml"}, {"merge": "a.yaml"}]}, "models[1]: has the name of `models[0]`"),
        ({"coverage": 0}, "coverage: expected a number above 0"),
        ({"samples": {"temperature": 0}}, "samples.temperature: expected a number above 0"),
        (
            {"data": {"eval": {"path": "a", "columns": {"answer": ["b", "c"]}}}},
            "data.eval.columns.answer: is one column; only `choices` may be a list of them, found a list.",
        ),
        ({"data": {"eval": {"path": "a", "separator": 3}}}, "data.eval.separator: expected text, found 3."),
        ({"max_length": 3}, "max_length: unknown key. Here it is `data.max_length`."),
    ],
)
def test_what_does_not_belong_together_is_refused(keys: dict[str, Any], message: str) -> None:
    assert any(problem.startswith(message) for problem in problems_of(**keys)), problems_of(**keys)
