"""Recipes that cannot be read or ask for what cannot be; the wording of each is tested with the recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from tests.bad_input.conftest import Refused
from tests.bad_input.site import Site

TEXTS: Mapping[str, tuple[str | bytes, tuple[str, ...]]] = {
    "10 MB": ("# " + "x" * 10_000_000, ("recipe.yaml: larger than",)),
    "10,000 deep": ("a: " + "[" * 10_000, ("recipe.yaml:1:", "deep")),
    "aliases": ("merge_method: &a linear\nmodels: *a\n", ("recipe.yaml:1:15", "no anchors and aliases")),
    "billion laughs": (
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        ("recipe.yaml:1:4", "no anchors and aliases"),
    ),
    "tags": ("merge_method: !!python/object/apply:os.system [echo]\n", ("recipe.yaml:1:15", "tag")),
    "duplicate keys": ("merge_method: linear\nmerge_method: linear\n", ("recipe.yaml:2:1", "merge_method")),
    "a list": ("- merge_method: linear\n", ("recipe.yaml:1:1", "mapping")),
    "nothing": ("", ("recipe.yaml",)),
    "no YAML": ("merge_method: [linear\n", ("recipe.yaml:",)),
    "not UTF-8": (b"merge_method: \xff\n", ("recipe.yaml", "UTF-8")),
    "two documents": ("merge_method: linear\n---\nmerge_method: linear\n", ("recipe.yaml:",)),
}


@pytest.mark.parametrize(("text", "fragments"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_no_recipe_is_refused(
    site: Site, refused: Refused, text: str | bytes, fragments: tuple[str, ...]
) -> None:
    file = site.root / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(*fragments, file=file)


def weights(*values: object) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        for model, value in zip(site.recipe["models"], values, strict=True):
            model["parameters"]["weight"] = value

    return change


CONTENTS: Mapping[str, tuple[Callable[[Site], object], tuple[str, ...]]] = {
    "misspelt key": (
        lambda site: site.recipe.update(merge_metod="linear"),
        ("merge_metod", "Did you mean `merge_method`?"),
    ),
    "misspelt parameter": (
        lambda site: site.recipe["models"][0]["parameters"].update(wieght=1),
        ("models[0].parameters.wieght", "Did you mean `weight`?"),
    ),
    "misspelt method": (
        lambda site: site.recipe.update(merge_method="gradient_match"),
        ("merge_method", "gradient_matching"),
    ),
    "mergekit's method": (
        lambda site: site.recipe.update(merge_method="dare_ties"),
        ("`dare_ties` is a method of mergekit that is not implemented here",),
    ),
    "mergekit's key": (lambda site: site.recipe.update(tokenizer_source="union"), ("tokenizer_source", "mergekit")),
    "all weights zero": (weights(0, 0.0), ("models", "every weight is zero, so there is nothing to merge.")),
    "weight NaN": (weights(float("nan"), 1), ("models[0].parameters.weight",)),
    "weight infinite": (weights("1e999", 1), ("models[0].parameters.weight",)),
    "no weight": (lambda site: site.recipe["models"][0].pop("parameters"), ("models[0].parameters.weight", "missing")),
    "no models": (lambda site: site.recipe.update(models=[]), ("models", "an empty list")),
    "a model twice": (
        lambda site: site.recipe["models"][1].update(site.recipe["models"][0]),
        ("models[1].model", "the same model as"),
    ),
    "weights that cancel": (
        lambda site: (weights(1, -1)(site), site.recipe.update(merge_method="linear")),
        ("cannot be normalized",),
    ),
    "no base": (lambda site: site.recipe.pop("base_model"), ("base_model", "missing", "gradient_matching")),
    "negative prior": (lambda site: site.recipe.update(precision={"prior": -1}), ("precision.prior",)),
    "floor of zero": (lambda site: site.recipe.update(precision={"floor": 0}), ("precision.floor",)),
    "unknown dtype": (lambda site: site.recipe.update(dtype="int8"), ("dtype",)),
    "unknown space": (lambda site: site.recipe.update(space="weights"), ("space",)),
    "unknown scale": (lambda site: site.recipe.update(scale="max"), ("scale",)),
    "filter for nothing": (
        weights([{"filter": "qproj", "value": 1}, {"value": 2}], 1),
        ("models[0].parameters.weight[0].filter", "matches no tensor name"),
    ),
    "filters that leave tensors out": (
        weights([{"filter": "q_proj", "value": 1}], 1),
        ("models[0].parameters.weight", "no filter gives tensor lm_head.weight a weight"),
    ),
    "density": (
        lambda site: (
            site.recipe.update(merge_method="task_arithmetic"),
            site.recipe["models"][0]["parameters"].update(density=0.5),
        ),
        ("models[0].parameters.density",),
    ),
}


@pytest.mark.parametrize(("change", "fragments"), CONTENTS.values(), ids=CONTENTS)
def test_a_recipe_that_asks_for_what_cannot_be_is_refused(
    site: Site, refused: Refused, change: Callable[[Site], object], fragments: tuple[str, ...]
) -> None:
    change(site)
    refused(*fragments)


def test_a_recipe_that_is_not_there_is_refused(site: Site, refused: Refused) -> None:
    refused("{root}/nowhere.yaml: cannot read the recipe", file=site.root / "nowhere.yaml")


def test_a_recipe_that_is_a_folder_is_refused(site: Site, refused: Refused) -> None:
    refused("{root}/one: cannot read the recipe", file=site.root / "one")


def test_all_faults_of_a_recipe_are_told_at_once(site: Site, refused: Refused) -> None:
    site.recipe.update(sede=1, dtype="int8")
    site.recipe["models"][1]["parameters"] = {"weight": "much"}
    message = refused("sede", "dtype", "models[1].parameters.weight")
    assert len(message.splitlines()) == 3
    assert all(line.startswith(f"{site.root}/recipe.yaml:1:") for line in message.splitlines())
