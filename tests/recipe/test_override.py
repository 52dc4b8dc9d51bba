"""`--set key.path=value`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import MergeRecipe, load_recipe
from tests.recipe.schemas import METHODS

RECIPE = """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b}
parameters:
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)


def load(*overrides: str) -> MergeRecipe:
    return load_recipe("r.yaml", methods=METHODS, overrides=("models[1].parameters.weight=1", *overrides))


def refusal_of(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("base_model=other", ("base_model",), "other"),
        ("models[0].model=c", ("models", 0, "model"), "c"),
        ("models[0].parameters.weight=1e-3", ("models", 0, "parameters", "weight"), 1e-3),
        ("models[0].parameters.weight=[0, 1]", ("models", 0, "parameters", "weight"), [0, 1]),
        ("models[0].parameters={weight: -1, density: 1}", ("models", 0, "parameters"), {"weight": -1, "density": 1}),
        ("models[1]={model: c, parameters: {weight: 2}}", ("models", 1), {"model": "c", "parameters": {"weight": 2}}),
        ("output.path=a=b", ("output", "path"), "a=b"),
        (" output.max_shard_size = 5GB", ("output", "max_shard_size"), 5 * 10**9),
        ("dtype=", ("dtype",), None),
        ("parameters.lambda=2", ("parameters", "lambda"), 2),
    ],
)
def test_a_value_is_replaced_or_added(override: str, path: tuple[str | int, ...], value: object) -> None:
    found: object = load(override).resolved()
    for step in path:
        found = found[step] if isinstance(step, int) else found.get(step)  # type: ignore[index, attr-defined]
    assert found == value


def test_the_rest_of_the_recipe_stays() -> None:
    changed, unchanged = load("models[0].model=c").resolved(), load().resolved()
    changed["models"][0]["model"] = "a"  # type: ignore[index]
    assert changed == unchanged


def test_the_last_of_several_wins() -> None:
    assert load("seed=1", "seed=2").seed == 2
    assert load("models[0].parameters.weight=1", "models[0].parameters={weight: 3}").models[0].parameters["weight"] == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models[0].parameters.weight=x", '--set models[0].parameters.weight: expected a number, found "x".'),
        (
            "models[0].parameters={weight: 1, densty: 1}",
            "--set models[0].parameters  models[0].parameters.densty: `task_arithmetic` has no such parameter."
            " Did you mean `density`?",
        ),
        ("sede=1", "--set sede: unknown key. Did you mean `seed`?"),
        ("seed", "--set seed: expected key.path=value."),
        ("=1", "--set : not a path of keys such as `models[0].parameters.weight`."),
        ("a..b=1", "--set a..b: not a path of keys such as `models[0].parameters.weight`."),
        ("models[x]=1", "--set models[x]: not a path of keys such as `models[0].parameters.weight`."),
        ("[0]=1", "--set [0]: not a path of keys such as `models[0].parameters.weight`."),
        ("models[2].model=c", "--set models[2].model: `models` has 2 entries, numbered from 0."),
        ("models.model=c", "--set models.model: `models` is a list, not a mapping."),
        ("base_model[0]=c", '--set base_model[0]: `base_model` is "base", not a list.'),
        ("base_model.path=c", '--set base_model.path: `base_model` is "base", not a mapping.'),
        (
            "seed=[",
            "--set seed:1:2  not YAML: expected the node content, but found '<stream end>'"
            " (while parsing a flow node).",
        ),
        ("seed=&a 1", "--set seed:1:1  anchor `&a`: recipes have no anchors and aliases; write the value out."),
        (
            "kind=preveiw",
            "--set kind: expected `merge`, `finetune`, `precision`, `preview` or `evaluate`, "
            'found "preveiw". Did you mean `preview`?',
        ),
    ],
)
def test_what_cannot_be_set_is_refused(override: str, message: str) -> None:
    assert refusal_of(override) == (message,)


def test_problems_of_the_file_come_first() -> None:
    Path("r.yaml").write_text(RECIPE + "dtype: bf16\n")
    problems = refusal_of("seed=-1")
    assert [problem.split("  ")[0].split(": ")[0] for problem in problems] == ["r.yaml:7:8", "--set seed"]


def test_a_replaced_fault_is_no_fault() -> None:
    Path("r.yaml").write_text(RECIPE.replace("weight: 0.5", "weight: .nan"))
    assert load("models[0].parameters.weight=1")


def test_places_of_what_was_set() -> None:
    recipe = load("output.path=x")
    assert recipe.where(("output", "path")) == "--set output.path"
    assert recipe.where(("models", 0, "model")) == "r.yaml:4:13"
    assert recipe.describe(("output", "path"), "is a file.") == "--set output.path: is a file."


def test_overrides_of_a_mapping() -> None:
    data = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    recipe = load_recipe(data, methods=METHODS, overrides=["seed=4"])
    assert recipe.seed == 4
    assert recipe.where(("seed",)) == "--set seed"
