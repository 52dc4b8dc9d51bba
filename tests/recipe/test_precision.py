"""The precision recipe: defaults, short forms, what excludes what, and the way to YAML and back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.precision.registry import ESTIMATORS
from mergekit_bayes.recipe import PrecisionRecipe, dump_yaml, load_recipe
from mergekit_bayes.recipe.precision import PRECISION_SPECS

ADAM: Mapping[str, Any] = {
    "estimator": "adam",
    "data": None,
    "optimizer_state": "checkpoint-10",
    "training_units": 500,
    "batch_size": 16,
}


def asked(**sections: object) -> dict[str, object]:
    """A short recipe; further sections, or others in their place, None for none."""
    content = {"kind": "precision", "model": "base", "data": {"train": "train.jsonl"}, "estimator": "fisher"}
    return {key: value for key, value in {**content, **sections}.items() if value is not None}


def load(**sections: object) -> PrecisionRecipe:
    return load_recipe(asked(**sections), expect=PrecisionRecipe)


def refusal_of(**sections: object) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load(**sections)
    return caught.value.problems


def test_what_is_not_written_has_its_default() -> None:
    recipe = load()
    assert (recipe.estimator.name, recipe.space, recipe.adapter) == ("fisher", "full", None)
    assert (recipe.num_examples, recipe.batch_size, recipe.seed, recipe.max_skipped) == (1000, 8, 0, 0.01)
    assert recipe.prior.weight_decay == 1e-8
    assert recipe.training_units is recipe.max_memory is recipe.output.path is None
    assert recipe.output.precision == "float32"


def test_an_estimator_is_a_name_or_a_mapping() -> None:
    kfac = {"eigenvalues": False, "max_dimension": 16384}
    assert dict(load(estimator="kfac").estimator.options) == kfac
    assert load(estimator="kfac") == load(estimator={"name": "kfac"})
    assert dict(load(estimator={"name": "kfac", "eigenvalues": True}).estimator.options) == {
        **kfac,
        "eigenvalues": True,
    }


@pytest.mark.parametrize(
    ("estimator", "adapter", "space"),
    [("fisher", None, "full"), ("kfac", None, "full"), ("ggn", "a", "factor"), ("gram", "a", "product")],
)
def test_the_space_follows_from_adapter_and_family(estimator: str, adapter: str | None, space: str) -> None:
    assert load(estimator=estimator, adapter=adapter).space == space


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"adam"}))
@pytest.mark.parametrize("space", ["factor", "product"])
def test_spaces_of_an_adapter(estimator: str, space: str) -> None:
    if space in ESTIMATORS[estimator].spaces:
        assert load(estimator=estimator, adapter="a", space=space).space == space
    else:
        (problem,) = refusal_of(estimator=estimator, adapter="a", space=space)
        assert problem == f"space: `{estimator}` describes the spaces `product` and `full`, found `{space}`."


def test_adam_reads_a_state_and_no_data() -> None:
    recipe = load(**ADAM, adapter="tuned")
    assert (recipe.space, recipe.optimizer_state, recipe.training_units) == ("factor", "checkpoint-10", 500)
    assert recipe.resolved().keys().isdisjoint({"num_examples", "seed", "max_skipped", "max_memory", "data"})
    missing = refusal_of(estimator="adam", data=None)
    assert [problem.split(":")[0] for problem in missing] == ["optimizer_state", "training_units", "batch_size"]
    (problem,) = refusal_of(**ADAM, adapter="tuned", space="product")
    assert problem == "space: `adam` describes the spaces `factor` and `full`, found `product`."


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"adapter": Path("tuned"), "estimator": {"name": "kfac", "eigenvalues": True}, "max_memory": "2GB"},
        {**ADAM, "adapter": "tuned"},
        {"prior": {"weight_decay": 0.5}, "output": {"path": "there", "precision": "bfloat16"}, "training_units": 9},
        {"data": {"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}], "packing": True}},
    ],
)
def test_a_resolved_recipe_reads_back(sections: Mapping[str, Any], tmp_path: Path) -> None:
    recipe = load(**sections)
    assert load_recipe(recipe.resolved(), expect=PrecisionRecipe) == recipe
    (tmp_path / "r.yaml").write_text(dump_yaml(recipe.resolved()))
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"estimator": {"eigenvalues": True}}, "estimator.name: missing; name the estimator, such as"),
        ({"estimator": ["kfac"]}, "estimator: expected `adam`"),
        ({"estimator": {"name": None}}, "estimator.name: expected `adam`"),
        ({"estimator": {"name": "kfac", 1: True}}, "estimator: a key is text, found 1."),
        ({"estimator": {"name": "kfac", "eigenvalues": "yes"}}, "estimator.eigenvalues: expected true or false"),
        ({"space": "dense"}, "space: expected `factor`, `product` or `full`"),
        ({"data": {"train": "a", "eval": "b"}}, "data.eval: a precision pass holds nothing out; remove it."),
        ({"data": {"train": ["a", "a"]}}, "data.train[1]: the same rows as `data.train[0]`"),
        ({"model": {"path": "b", "bnb_4bit_quant_type": "fp4"}}, "model.bnb_4bit_quant_type: has no effect without"),
        ({"model": None, "base_model": "b"}, "base_model: unknown key. Here it is `model`."),
        ({"training": {}}, "training: unknown key. Did you mean `training_units`?"),
    ],
)
def test_what_no_pass_can_do_is_refused(sections: Mapping[str, Any], problem: str) -> None:
    (seen,) = refusal_of(**sections)
    assert seen.startswith(problem)


def test_every_key_is_explained() -> None:
    missing = [
        f"{spec.__name__}.{name}"
        for spec in PRECISION_SPECS.values()
        for name in spec.model_fields
        if f"        {name}: " not in (spec.__doc__ or "").replace("    Attributes", "")
    ]
    assert missing == []


def test_reading_one_imports_nothing_heavy() -> None:
    program = (
        f"import sys; from mergekit_bayes.recipe import load_recipe; load_recipe({asked(estimator='kfac')!r})\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
