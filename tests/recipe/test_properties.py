"""Random recipes: valid ones survive the way to YAML and back, all others are refused and never crash."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import dump_yaml, load_recipe, parse_document
from tests.recipe.schemas import METHODS

numbers = st.floats(-9, 9) | st.integers(-9, 9)
words = st.text(min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
)
filters = st.lists(
    st.fixed_dictionaries({"filter": words, "value": numbers | st.lists(numbers, min_size=1, max_size=3)}), max_size=3
)
weights = (
    st.floats(0.1, 9)
    | st.lists(numbers, min_size=1, max_size=4).map(lambda values: [*values, 1])
    | filters.map(lambda conditions: [*conditions, {"value": 1.5}])
)
sources = st.fixed_dictionaries(
    {"model": words, "parameters": weights.map(lambda weight: {"weight": weight})},
    optional={"precision": st.none() | st.just(False) | st.floats(1e-3, 1e9) | words},
)
recipes = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(["linear", "task_arithmetic", "fisher", "gradient_matching"]),
        "models": st.lists(sources, min_size=1, max_size=4, unique_by=lambda source: source["model"]),
    },
    optional={
        "kind": st.just("merge"),
        "base_model": st.none() | words,
        "dtype": st.sampled_from([None, "bfloat16", "float16", "float32", "float64"]),
        "out_dtype": st.sampled_from([None, "bfloat16"]),
        "space": st.sampled_from([None, "product", "factor", "full"]),
        "scale": st.sampled_from(["sum", "mean"]),
        "precision": st.fixed_dictionaries(
            {}, optional={"prior": st.floats(1e-9, 1e9) | words, "floor": st.floats(1e-300, 1)}
        ),
        "output": st.fixed_dictionaries(
            {},
            optional={
                "path": words,
                "max_shard_size": st.integers(1, 2**60) | st.integers(1, 999).map("{} MiB".format),
                "rank": st.none() | st.integers(1, 99),
                "precision": st.sampled_from(["float32", "bfloat16", False]),
            },
        ),
        "seed": st.integers(0, 2**63 - 1),
    },
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "parameters", "weight", "filter", "value", "path", "lora"]) | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def problems_of(data: dict[str, Any], *overrides: str) -> tuple[str, ...] | None:
    """What a recipe is refused with; None for one that is read."""
    try:
        load_recipe(data, methods=METHODS, overrides=overrides)
    except RecipeError as error:
        return error.problems
    return None


@given(recipes)
def test_a_recipe_survives_the_way_to_yaml_and_back(data: dict[str, Any]) -> None:
    recipe = load_recipe(data, methods=METHODS)
    text = dump_yaml(recipe.resolved())
    again = load_recipe(parse_document(text, "again.yaml").data, methods=METHODS)
    assert again == recipe
    assert dump_yaml(again.resolved()) == text


@given(
    st.dictionaries(
        st.sampled_from(
            ["merge_method", "models", "base_model", "parameters", "precision", "output", "seed", "kind", "dtype"]
        )
        | st.text(max_size=5),
        anything,
        max_size=6,
    )
)
def test_any_mapping_is_read_or_refused(data: dict[str, Any]) -> None:
    problems = problems_of(data)
    assert problems is None or (problems and all(line.strip() and "\n" not in line for line in problems))


@given(recipes, anything, st.data())
def test_any_value_in_any_place_is_read_or_refused(recipe: dict[str, Any], value: object, data: st.DataObject) -> None:
    changed = copy.deepcopy(recipe)
    node: Any = changed
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            node[key] = value
            break
        node = inner
    problems = problems_of(changed)
    assert problems is None or (problems and all(line.strip() and "\n" not in line for line in problems))


@given(st.text(max_size=30))
def test_any_override_is_applied_or_refused(override: str) -> None:
    data = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    problems = problems_of(data, override)
    assert all(line.startswith("--set ") for line in problems or ())
