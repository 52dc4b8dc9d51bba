"""From a file or a mapping to a recipe: defaults, places, forms of one thing, and back to YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import MergeRecipe, dump_yaml, load_recipe, unused_filter_problems
from tests.recipe.schemas import METHODS

RECIPE = """\
merge_method: task_arithmetic
base_model: models/base
models:
  - model: models/code
    parameters:
      weight:
        - {filter: mlp, value: [0, 1]}
  - {model: models/prose, precision: 100, parameters: {density: 1}}
parameters: {weight: 0.5, lambda: [1, 0.5]}
dtype: bfloat16
precision: {floor: 1e-6}
output: {path: merged, max_shard_size: 200MB, rank: 8, precision: false}
"""


def load(source: str | Path | Mapping[str, object]) -> MergeRecipe:
    return load_recipe(source, methods=METHODS)


def two(**changes: object) -> dict[str, object]:
    """A recipe of two models as a mapping; None removes a key."""
    data: dict[str, object] = {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 1}},
            {"model": "b", "parameters": {"weight": 2}},
        ],
    }
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


def refusal_of(data: Mapping[str, object]) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load(data)
    return caught.value.problems


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MergeRecipe:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return load("r.yaml")


def test_what_is_written_is_what_is_read(recipe: MergeRecipe) -> None:
    assert recipe.merge_method == "task_arithmetic"
    assert recipe.base_model == "models/base"
    assert [source.model for source in recipe.models] == ["models/code", "models/prose"]
    assert [source.precision for source in recipe.models] == [None, 100]
    assert recipe.dtype == "bfloat16"
    assert recipe.precision.floor == 1e-6
    assert recipe.output.path == "merged"
    assert recipe.output.max_shard_size == 200_000_000
    assert recipe.output.rank == 8
    assert recipe.output.precision is False


def test_what_is_not_written_has_its_default(recipe: MergeRecipe) -> None:
    assert (recipe.kind, recipe.scale, recipe.seed) == ("merge", "sum", 0)
    assert (recipe.out_dtype, recipe.space, recipe.precision.prior) == (None, None, None)
    assert recipe.parameters["normalize"] is False
    assert load(two()).output.max_shard_size == 5 * 10**9
    assert load(two()).output.precision == "float32"


def test_defaults_of_the_method_come_after_what_is_written(recipe: MergeRecipe) -> None:
    assert list(recipe.parameters) == ["weight", "lambda", "normalize"]
    assert recipe.setting("lambda", tensor_name="x", t=1.0) == 0.5


def test_a_source_goes_before_the_recipe_and_its_filters_fall_through(recipe: MergeRecipe) -> None:
    weights = [
        recipe.setting("weight", tensor_name=name, t=0.25, source=source)
        for source in (0, 1)
        for name in ("layers.0.mlp.w", "layers.0.attn.w")
    ]
    assert weights == [0.25, 0.5, 0.5, 0.5]
    assert recipe.setting("density", tensor_name="x", t=0, source=0) is None


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), "r.yaml:1:1"),
        (("base_model",), "r.yaml:2:13"),
        (("models", 0, "model"), "r.yaml:4:12"),
        (("models", 0, "parameters", "weight", 0, "filter"), "r.yaml:7:20"),
        (("models", 1, "parameters", "weight"), "r.yaml:8:55"),  # not there: the mapping around it
        (("models", 7, "model"), "r.yaml:4:3"),
        (("space",), "r.yaml:1:1"),
    ],
)
def test_places_in_a_file(recipe: MergeRecipe, path: tuple[str | int, ...], place: str) -> None:
    assert recipe.where(path) == place


def test_places_of_a_mapping_are_key_paths() -> None:
    recipe = load(two())
    assert recipe.where(("models", 0, "model")) == "models[0].model"
    assert recipe.describe(("models", 0, "model"), "no such folder.") == "models[0].model: no such folder."
    assert recipe.describe((), "too large.") == "too large."


def test_problems_found_later_are_written_like_the_others(recipe: MergeRecipe) -> None:
    expected = "r.yaml:4:12  models[0].model: no such folder."
    assert recipe.describe(("models", 0, "model"), "no such folder.") == expected


def test_unused_filters_are_reported_with_their_place(recipe: MergeRecipe) -> None:
    assert unused_filter_problems(recipe, ["layers.0.mlp.w"]) == []
    assert unused_filter_problems(recipe, ["layers.0.attn.w"]) == [
        'r.yaml:7:20  models[0].parameters.weight[0].filter: "mlp" matches no tensor name.'
    ]


def test_a_mapping_and_a_file_make_the_same_recipe(recipe: MergeRecipe) -> None:
    from ruamel.yaml import YAML

    assert load(YAML(typ="safe", pure=True).load(RECIPE)) == recipe


def test_a_recipe_is_read_back_from_its_resolved_form(recipe: MergeRecipe) -> None:
    text = dump_yaml(recipe.resolved())
    Path("again.yaml").write_text(text)
    again = load("again.yaml")
    assert again == recipe
    assert dump_yaml(again.resolved()) == text


def test_the_resolved_form_has_every_default(recipe: MergeRecipe) -> None:
    assert dump_yaml(recipe.resolved()) == (
        "kind: merge\n"
        "merge_method: task_arithmetic\n"
        "base_model: models/base\n"
        "models:\n"
        "- model: models/code\n"
        "  parameters:\n"
        "    weight:\n"
        "    - filter: mlp\n"
        "      value: [0, 1]\n"
        "- model: models/prose\n"
        "  parameters: {density: 1}\n"
        "  precision: 100\n"
        "parameters:\n"
        "  weight: 0.5\n"
        "  lambda: [1, 0.5]\n"
        "  normalize: false\n"
        "dtype: bfloat16\n"
        "scale: sum\n"
        "precision: {floor: 1e-06}\n"
        "output: {path: merged, max_shard_size: 200000000, rank: 8, precision: false}\n"
        "seed: 0\n"
    )


def test_recipes_are_frozen(recipe: MergeRecipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        recipe.parameters["weight"] = 1.0  # type: ignore[index]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.models[0].model = "x"  # type: ignore[misc]


def test_an_input_mapping_is_not_changed() -> None:
    data = two(parameters={"normalize": False})
    before = repr(data)
    load_recipe(data, methods=METHODS, overrides=["models[0].parameters.weight=3", "output.path=x"])
    assert repr(data) == before


def test_aliases_of_methods_are_accepted() -> None:
    assert load(two(merge_method="fisher")).merge_method == "fisher"


def test_paths_are_accepted_for_names() -> None:
    models = [{"model": Path("/models/a"), "parameters": {"weight": 1}}]
    recipe = load(two(models=models, output={"path": Path("out")}))
    assert (recipe.models[0].model, recipe.output.path) == ("/models/a", "out")


def test_tuples_are_accepted_for_lists() -> None:
    models = ({"model": "a", "parameters": {"weight": (0, 1)}},)
    assert (
        load(two(models=models)).models == load(two(models=[{"model": "a", "parameters": {"weight": [0, 1]}}])).models
    )


@pytest.mark.parametrize("key", ["base_model", "parameters", "dtype", "out_dtype", "space", "precision", "output"])
def test_an_optional_key_may_have_no_value(key: str) -> None:
    assert load({**two(), key: None}) == load(two())


@pytest.mark.parametrize(
    ("reference", "short"),
    [
        ("org/base", "org/base"),
        ("org/base@v2+org/adapter@main", "org/base@v2+org/adapter@main"),
        ({"model": "org/base"}, "org/base"),
        ({"model": "/odd+name@home"}, "/odd+name@home"),
        ({"model": "org/base", "lora": None}, "org/base"),
        ({"model": "org/base@v2", "lora": "org/adapter"}, "org/base@v2+org/adapter"),
        ({"model": {"path": "org/base"}}, "org/base"),
        ({"model": {"path": "org/base", "revision": None}}, "org/base"),
        ({"model": {"path": "org/base", "revision": "v2"}, "lora": {"path": "b", "revision": "c"}}, "org/base@v2+b@c"),
    ],
)
def test_the_long_form_of_a_reference_is_its_short_form(reference: object, short: str) -> None:
    assert load(two(base_model=reference)).base_model == short


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("200MB", 200 * 10**6),
        ("1.5 kB", 1500),
        ("64KiB", 65536),
        ("2T", 2 * 10**12),
        ("700B", 700),
        ("700", 700),
        (700, 700),
    ],
)
def test_sizes(size: object, count: int) -> None:
    assert load(two(output={"max_shard_size": size})).output.max_shard_size == count


@pytest.mark.parametrize(
    "size", ["", "GB", "5XB", "-5GB", "5 G B", 0, -1, 1.5, True, "1e3", [5], 2**64, "9" * 39 + "T"]
)
def test_what_is_no_size(size: object) -> None:
    (problem,) = refusal_of(two(output={"max_shard_size": size}))
    assert problem.startswith("output.max_shard_size: expected a size")


@pytest.mark.parametrize("value", [True, False, 1, 0, 1.0, 0.0])
def test_booleans_are_also_read_from_one_and_zero(value: object) -> None:
    # as mergekit's own dumps of recipes write them
    found = load(two(parameters={"normalize": value})).parameters["normalize"]
    assert found is bool(value)


@pytest.mark.parametrize(
    ("precision", "kept"), [(None, None), (False, False), (2, 2), (1e-3, 1e-3), ("p.safetensors", "p.safetensors")]
)
def test_precisions_of_a_source(precision: object, kept: object) -> None:
    models = [{"model": "a", "parameters": {"weight": 1}, "precision": precision}]
    found = load(two(models=models)).models[0].precision
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize("prior", [None, 2, 1e-3, "base/precision.safetensors"])
def test_priors(prior: object) -> None:
    found = load(two(precision={"prior": prior})).precision.prior
    assert found == prior
    assert type(found) is type(prior)


@pytest.mark.parametrize("precision", [True, 0, -1, float("nan"), float("inf"), "", [], {}])
def test_what_is_no_precision_of_a_source(precision: object) -> None:
    models = [{"model": "a", "parameters": {"weight": 1}, "precision": precision}]
    (problem,) = refusal_of(two(models=models))
    assert problem.startswith("models[0].precision: expected")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (11, "expected at most 10, found 11."),
        ([0, -11], "expected at least -10, found -11."),
        (10**400, "expected a finite number, found an integer of 1329 bits."),
    ],
)
def test_parameters_keep_to_their_range(value: object, message: str) -> None:
    (problem,) = refusal_of(two(merge_method="task_arithmetic", parameters={"lambda": value}))
    assert problem.endswith(message)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": 2.0}, "parameters.steps: expected a whole number, found 2.0."),
        ({"steps": 0}, "parameters.steps: expected at least 1, found 0."),
        ({"mode": 3}, "parameters.mode: expected text, found 3. Put it in quotes if it is a name."),
    ],
)
def test_parameters_keep_to_their_type(parameters: dict[str, object], message: str) -> None:
    assert refusal_of(two(merge_method="tuned", parameters=parameters)) == (message,)


def test_parameters_without_default_stay_unset() -> None:
    recipe = load(two(merge_method="tuned"))
    assert dict(recipe.parameters) == {"steps": 3, "mode": "fast"}


def test_the_base_among_the_models_needs_no_weight() -> None:
    models = [{"model": "base"}, {"model": "a", "parameters": {"weight": 1}}]
    assert len(load(two(merge_method="task_arithmetic", base_model="base", models=models)).models) == 2
    assert refusal_of(two(merge_method="linear", base_model="base", models=models)) == (
        "models[0].parameters.weight: missing; `linear` needs a weight for every model.",
    )


def test_weights_that_filters_take_from_the_recipe_are_not_all_zero() -> None:
    own = {"weight": [{"filter": "mlp", "value": 0}]}
    models = [{"model": "a", "parameters": own}]
    assert load(two(models=models, parameters={"weight": 1}))
    assert refusal_of(two(models=models, parameters={"weight": 0})) == (
        "models: every weight is zero, so there is nothing to merge.",
    )


@pytest.mark.parametrize("key", [1, None, ("a",), 2.5, b"x"])
def test_keys_of_a_mapping_are_text(key: object) -> None:
    for data in (
        {**two(), key: 1},
        two(parameters={key: 1}),
        two(models=[{"model": "a", "parameters": {"weight": 1}, key: 1}]),
        two(models=[{"model": "a", "parameters": {"weight": {"value": 1, key: 1}}}]),
        two(base_model={"model": "a", key: 1}),
    ):
        assert refusal_of(data)


def test_a_recipe_that_refers_to_itself_is_refused() -> None:
    data = two()
    data["models"] = [data]
    assert refusal_of(data)


def test_the_kind_may_be_written_but_not_left_empty() -> None:
    assert load(two(kind="merge")) == load(two())
    kinds = "`merge`, `finetune`, `precision`, `preview` or `evaluate`"
    assert refusal_of({**two(), "kind": None}) == (f"kind: expected {kinds}, found nothing.",)
