"""The preview recipe: defaults, shorthands, and every problem at once."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe

SMALL: dict[str, Any] = {
    "kind": "preview",
    "base_model": "base",
    "models": [{"model": "tuned/code"}, {"model": "tuned/docs", "precision": 2.0}],
    "methods": ["task_arithmetic", {"merge_method": "posterior", "name": "rule", "precision": {"prior": 0.5}}],
    "tasks": [{"data": "code.txt"}, {"data": {"eval": ["docs.txt"], "max_length": 64}, "metric": "accuracy"}],
}
RUN: dict[str, Any] = {"name": "run", "model": "tuned/both", "weights": [0.5, 0.5], "minutes": 3.0}


def load(**changes: Any) -> PreviewRecipe:
    content = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    return load_recipe(content, expect=PreviewRecipe, methods=method_schemas())


def problems(**changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(**changes)
    return list(caught.value.problems)


def test_defaults_and_shorthands() -> None:
    recipe = load()
    assert recipe.task_names == ("code", "docs")
    assert recipe.experts == (0, 1)
    assert [method.title for method in recipe.compared] == ["task_arithmetic", "rule"]
    assert [task.higher_is_better for task in recipe.tasks] == [False, True]
    assert recipe.tasks[0].data is not None
    assert recipe.tasks[0].data.eval[0].path == "code.txt"
    assert (recipe.scale, recipe.fidelity, recipe.design.kind) == ("mean", ("surrogate", "evaluated"), "simplex")
    assert load(design=0.25).design.step == 0.25
    assert load(design=[[1, 0], [0, 1]]).design.kind == "list"
    assert load(methods=None, merge_method="linear").compared[0].title == "linear"
    assert load(fidelity="surrogate", tasks=[{}, {}]).tasks[0].data is None


def test_a_resolved_recipe_reads_back_to_itself() -> None:
    for recipe in (
        load(),
        load(design={"kind": "random", "points": 3}),
        load(merge_method="linear", methods=None),
        load(references=[RUN]),
    ):
        again = load_recipe(recipe.resolved(), expect=PreviewRecipe, methods=method_schemas())
        assert again == recipe


def test_the_merge_of_a_mix_is_a_merge_recipe() -> None:
    recipe = load(output={"rank": 4}, space="product")
    content = recipe.merge_of(recipe.compared[1], (0.25, 0.75))
    merge = load_recipe(content, methods=method_schemas())
    assert merge.kind == "merge"
    assert [dict(source.parameters.entries)["weight"] for source in merge.models] == [0.25, 0.75]
    assert (merge.merge_method, merge.space, merge.scale, merge.output.rank) == ("posterior", "product", "mean", 4)
    assert (merge.precision.prior, merge.models[1].precision) == (0.5, 2.0)


def test_every_problem_is_reported_at_its_place() -> None:
    found = problems(
        base_model=None,
        models=[{"model": "tuned/code", "parameters": {"weight": 1, "densty": 2}}, {"model": "tuned/code"}],
        methods=["linear", {"merge_method": "posteriour"}, "linear"],
        tasks=[{"metric": "lose"}],
        design={"step": 0.3, "points": 4},
        budget={"point": 3},
    )
    text = "\n".join(found)
    for part in (
        "base_model: missing",
        "models[0].parameters.weight: the weights of a preview come from its `design`",
        "models[0].parameters.densty",
        "models[1].model: the same model as `models[0]`",
        "methods[1].merge_method: no merge method is called",
        "methods[2]: has the name of another entry",
        "tasks: one task; a trade-off needs at least two",
        "tasks[0].metric: expected `loss`",
        "tasks[0].data: missing; only `fidelity: surrogate` needs no data",
        "design.step: found 0.3",
        "design.points: belongs to `kind: random`",
        "budget.point: unknown key. Did you mean `points`?",
    ):
        assert part in text, part
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": None}, "methods: missing; list what is compared"),
        ({"merge_method": "linear"}, "merge_method: one method beside a list of `methods`"),
        ({"parameters": {"normalize": False}}, "belongs to one method"),
        ({"tasks": [{"model": "other", "data": "a"}, {"data": "b"}]}, "tasks[0].model: is none of `models`"),
        ({"tasks": [{"data": "a", "better": "higher"}, {"data": "b"}]}, "of `loss`, lower is better"),
        ({"tasks": [{"data": {"train": "a"}}, {"data": "b"}]}, "tasks[0].data.train: a task is evaluated, not learned"),
        ({"tasks": [{"name": "docs", "data": "a"}, {"data": "b"}]}, "tasks[1]: has the name of `tasks[0]`"),
        ({"design": {"kind": "random"}}, "design.points: missing"),
        ({"design": {"adaptive": True}}, "budget.points: missing; an adaptive design"),
        ({"design": {"adaptive": True}, "fidelity": "surrogate"}, "design.adaptive: adapts to evaluated mixes"),
        ({"design": [[1, 0], [1]]}, "design.weights[1]: 1 weights for 2 models"),
        ({"design": [[0, 0], [1, 0]]}, "design.weights[0]: every weight is zero"),
        ({"design": {"step": 0.1, "partitions": 3}}, "partitions beside `step`"),
        ({"fidelity": ["surrogate", "fitted"]}, "`fitted` is fitted to evaluated mixes"),
        ({"fidelity": "surogate"}, "Did you mean `surrogate`?"),
        ({"references": [{"name": "run", "scores": {"code": 1.0}}]}, "the tasks are `code` and `docs`"),
        ({"references": [{"name": "run"}]}, "references[0]: has neither `scores`, one for every task, nor a `model`"),
        (
            {"references": [{"name": "run", "model": "both", "scores": {"code": 1.0, "docs": 2.0}}]},
            "references[0].scores: beside a `model` that is evaluated",
        ),
        (
            {"references": [{"name": "run", "model": "both"}], "fidelity": "surrogate"},
            "references[0].model: is evaluated; add `evaluated` to `fidelity`",
        ),
        (
            {"references": [{"name": "run", "scores": {"code": 1.0, "docs": 2.0}, "weights": [1]}]},
            "references[0].weights: 1 weights for 2 models",
        ),
        ({"methods": [{"merge_method": "linear", "parameters": {"normalise": 1}}]}, "methods[0].parameters.normalise"),
        ({"output": {"precision": False}}, "a key of merges"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    assert any(message in problem for problem in problems(**changes)), problems(**changes)
