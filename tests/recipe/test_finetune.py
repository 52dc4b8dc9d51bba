"""The fine-tuning recipe: defaults, short forms, places, and the way to YAML and back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import (
    AdamWSpec,
    AdapterSpec,
    DatasetSpec,
    FinetuneRecipe,
    IvonSpec,
    MergeRecipe,
    TrainingSpec,
    dump_yaml,
    load_recipe,
)
from mergekit_bayes.recipe.finetune import SPECS
from tests.recipe.schemas import METHODS

RECIPE = """\
kind: finetune
model: {path: org/base@v2, load_in_4bit: true, dtype: bfloat16}
adapter: {r: 16, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 4}}
data:
  train:
    - {path: chats.jsonl, weight: 0.7}
    - {path: org/corpus, format: text, columns: {text: body}, weight: 0.3}
  eval_fraction: 0.05
optimizer: {lr: 0.05, ess: 1e6}
training: {max_steps: 100, warmup_steps: 0.1, report_to: tensorboard}
output: {path: tuned}
"""


def load(source: str | Path | Mapping[str, object]) -> FinetuneRecipe:
    return load_recipe(source, expect=FinetuneRecipe)


def asked(**sections: object) -> dict[str, object]:
    """A short recipe as a mapping; further sections, or others in their place."""
    return {"kind": "finetune", "model": "base", "data": {"train": "train.jsonl"}, **sections}


def refusal_of(data: Mapping[str, object], **options: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(data, **options)
    return caught.value.problems


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneRecipe:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)
    return load("r.yaml")


def test_what_is_written_is_what_is_read(recipe: FinetuneRecipe) -> None:
    assert (recipe.model.path, recipe.model.load_in_4bit, recipe.model.dtype) == ("org/base@v2", True, "bfloat16")
    assert recipe.adapter is not None
    assert (recipe.adapter.r, recipe.adapter.target_modules) == (16, ("q_proj", "v_proj"))
    assert dict(recipe.adapter.rank_pattern) == {"q_proj": 4}
    assert [entry.path for entry in recipe.data.train] == ["chats.jsonl", "org/corpus"]
    assert dict(recipe.data.train[1].columns) == {"text": "body"}
    assert isinstance(recipe.optimizer, IvonSpec)
    assert (recipe.optimizer.lr, recipe.optimizer.ess) == (0.05, 1e6)
    assert (recipe.training.max_steps, recipe.training.warmup_steps) == (100, 0.1)
    assert recipe.training.report_to == ("tensorboard",)


def test_what_is_not_written_has_its_default() -> None:
    recipe = load(asked())
    assert recipe.adapter is None
    assert recipe.optimizer == IvonSpec()
    assert recipe.training == TrainingSpec()
    assert (recipe.data.eval, recipe.data.eval_fraction, recipe.data.labels) == ((), None, None)
    assert recipe.output.precision == "float32"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"model": "org/base"}, {"model": {"path": "org/base"}}),
        ({"model": Path("base")}, {"model": {"path": "base"}}),
        ({"adapter": "lora"}, {"adapter": {}}),
        ({"adapter": None}, {}),
        ({"optimizer": "ivon"}, {"optimizer": {"name": "ivon"}}),
        ({"optimizer": "adamw"}, {"optimizer": {"name": "adamw"}}),
        ({"optimizer": {"lr": 0.2}}, {"optimizer": {"name": "ivon", "lr": 0.2}}),
        ({"optimizer": None, "training": None, "output": None}, {}),
        ({"data": {"train": "a.jsonl"}}, {"data": {"train": [{"path": "a.jsonl"}]}}),
        ({"data": {"train": Path("a.jsonl")}}, {"data": {"train": [{"path": "a.jsonl"}]}}),
        ({"data": {"train": {"path": "a.jsonl"}}}, {"data": {"train": [{"path": "a.jsonl"}]}}),
        ({"data": {"train": ["a", {"path": "b"}]}}, {"data": {"train": [{"path": "a"}, {"path": "b"}]}}),
        ({"data": {"train": "a", "eval": "b"}}, {"data": {"train": [{"path": "a"}], "eval": [{"path": "b"}]}}),
        ({"data": {"train": "a", "eval": None}}, {"data": {"train": "a", "eval": []}}),
        ({"training": {"report_to": "none"}}, {"training": {"report_to": []}}),
        ({"training": {"report_to": "wandb"}}, {"training": {"report_to": ["wandb"]}}),
        ({"training": {"bf16": 1}}, {"training": {"bf16": True}}),
    ],
)
def test_short_forms(short: dict[str, object], long: dict[str, object]) -> None:
    assert load(asked(**short)) == load(asked(**long))


@pytest.mark.parametrize("value", [None, "a.*b", "all-linear", ["q", "v"]])
def test_target_modules(value: object) -> None:
    recipe = load(asked(adapter={"target_modules": value}))
    assert recipe.adapter is not None
    assert recipe.adapter.target_modules == (tuple(value) if isinstance(value, list) else value)
    assert load(recipe.resolved()) == recipe  # None is written out: it is not the default


@pytest.mark.parametrize(("value", "kept"), [(0, 0), (7, 7), (0.25, 0.25), (0.0, 0.0)])
def test_warm_up_counts_steps_or_is_a_share_of_them(value: float, kept: float) -> None:
    found = load(asked(training={"warmup_steps": value})).training.warmup_steps
    assert found == kept
    assert type(found) is type(kept)


def test_sections_may_be_specs() -> None:
    # in Python a section can be made by hand
    sections = {
        "adapter": AdapterSpec(r=2),
        "optimizer": AdamWSpec(lr=0.1),
        "data": {"train": [DatasetSpec(path="a.jsonl")]},
    }
    recipe = load(asked(**sections))
    assert (recipe.adapter, recipe.optimizer) == (AdapterSpec(r=2), AdamWSpec(lr=0.1))
    assert recipe.data.train == (DatasetSpec(path="a.jsonl"),)


def test_adamw_leaves_no_precision() -> None:
    recipe = load(asked(optimizer="adamw"))
    assert recipe.output.precision is False
    assert load(recipe.resolved()) == recipe


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), "r.yaml:1:1"),
        (("model", "path"), "r.yaml:2:15"),
        (("adapter", "rank_pattern", "q_proj"), "r.yaml:3:75"),
        (("data", "train", 1, "columns", "text"), "r.yaml:7:56"),
        (("data", "eval_fraction"), "r.yaml:8:18"),
        (("training", "seed"), "r.yaml:10:11"),  # not there: the mapping around it
    ],
)
def test_places_in_a_file(recipe: FinetuneRecipe, path: tuple[str | int, ...], place: str) -> None:
    assert recipe.where(path) == place


def test_places_of_short_forms_are_those_of_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("kind: finetune\nmodel: base\ndata: {train: a.jsonl, eval: {path: b.jsonl}}\n")
    recipe = load("r.yaml")
    assert recipe.describe(("model", "path"), "not there.") == "r.yaml:2:8  model: not there."
    assert recipe.describe(("data", "train", 0, "path"), "empty.") == "r.yaml:3:15  data.train: empty."
    assert recipe.describe(("data", "eval", 0, "path"), "empty.") == "r.yaml:3:37  data.eval.path: empty."
    assert recipe.describe(("optimizer", "lr"), "large.") == "r.yaml:1:1  optimizer.lr: large."


def test_places_of_a_mapping_are_key_paths() -> None:
    assert load(asked()).describe(("data", "train", 0, "path"), "empty.") == "data.train: empty."
    assert load(asked(data={"train": ["a"]})).describe(("data", "train", 0), "empty.") == "data.train[0]: empty."


def test_a_recipe_knows_its_folder(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert load(tmp_path / "r.yaml").folder == tmp_path
    assert load(asked()).folder is None


def test_the_resolved_form_has_every_default_that_has_an_effect(recipe: FinetuneRecipe) -> None:
    resolved: dict[str, Any] = recipe.resolved()
    assert list(resolved) == ["kind", "model", "adapter", "data", "optimizer", "training", "output"]
    assert resolved["model"]["bnb_4bit_quant_type"] == "nf4"
    assert resolved["data"]["train"][0] == {"path": "chats.jsonl", "split": "train", "weight": 0.7}
    assert resolved["optimizer"]["name"] == "ivon"
    assert resolved["optimizer"]["noise_to_weight"] == 0.1
    assert "num_train_epochs" not in resolved["training"]  # max_steps wins, as in TrainingArguments
    plain: dict[str, Any] = load(asked()).resolved()
    assert "num_train_epochs" in plain["training"]
    assert not [key for key in plain["model"] if key.startswith("bnb_")]
    assert "adapter" not in plain


def test_a_recipe_is_read_back_from_its_resolved_form(recipe: FinetuneRecipe) -> None:
    text = dump_yaml(recipe.resolved())
    Path("again.yaml").write_text(text)
    again = load("again.yaml")
    assert again == recipe
    assert dump_yaml(again.resolved()) == text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_recipes_are_frozen_and_can_be_copied_and_sent(recipe: FinetuneRecipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe.model = recipe.model  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        recipe.data.train[1].columns["text"] = "x"  # type: ignore[index]
    assert copy.deepcopy(recipe) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_changes_from_the_command_line() -> None:
    changes = ["training.max_steps=5", "optimizer=adamw", "data.train[0].max_rows=3", "adapter.r=4"]
    recipe = load_recipe(asked(data={"train": [{"path": "a"}]}), expect=FinetuneRecipe, overrides=changes)
    assert recipe.adapter is not None
    found = (recipe.training.max_steps, recipe.optimizer.name, recipe.data.train[0].max_rows, recipe.adapter.r)
    assert found == (5, "adamw", 3, 4)


def test_a_wrong_change_from_the_command_line_says_which() -> None:
    problems = refusal_of(asked(), overrides=["training.epochs=2", "data.train.path=b"])
    assert problems == ('--set data.train.path: `data.train` is "train.jsonl", not a mapping.',)
    assert refusal_of(asked(), overrides=["training.epochs=2"]) == (
        "--set training.epochs: unknown key. Here it is `training.num_train_epochs`.",
    )


def test_each_caller_gets_the_kind_it_expects() -> None:
    merge = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    assert isinstance(load_recipe(asked()), FinetuneRecipe)
    assert isinstance(load_recipe(merge, methods=METHODS), MergeRecipe)
    assert isinstance(load_recipe(merge, expect=MergeRecipe, methods=METHODS), MergeRecipe)
    assert refusal_of(asked(), expect=MergeRecipe) == ("kind: expected a recipe of kind `merge`, found `finetune`.",)
    assert refusal_of(merge, expect=FinetuneRecipe) == ("kind: expected a recipe of kind `finetune`, found `merge`.",)


@pytest.mark.parametrize("key", ["data", "training", "adapter", "optimizer"])
def test_a_recipe_without_kind_that_looks_like_one_to_fine_tune(key: str) -> None:
    (problem,) = refusal_of({"model": "base", key: {}})
    assert problem == "kind: missing; this looks like a recipe to fine-tune. Write `kind: finetune`."


def test_a_merge_with_a_section_too_many_is_still_a_merge() -> None:
    problems = refusal_of({"merge_method": "linear", "models": [], "training": {}}, methods=METHODS)
    assert problems[-1] == (
        "training: unknown key. Known here: `kind`, `merge_method`, `base_model`, `models`, `parameters`, `dtype`, "
        "`out_dtype`, `space`, `scale`, `precision`, `output`, `seed`."
    )


@pytest.mark.parametrize("key", [1, None, ("a",), 2.5, b"x"])
@pytest.mark.parametrize("place", ["", *sorted({place[0] for place in SPECS if place}), "train", "columns"])
def test_keys_of_a_mapping_are_text(key: object, place: str) -> None:
    wrong = {
        "": {key: 1},
        "model": {"model": {"path": "a", key: 1}},
        "data": {"data": {"train": "a", key: 1}},
        "train": {"data": {"train": {"path": "a", key: 1}}},
        "columns": {"data": {"train": {"path": "a", "columns": {key: "a"}}}},
    }.get(place, {place: {key: 1}})
    (problem,) = refusal_of({**asked(), **wrong})
    assert "key is text, found" in problem


def test_every_key_is_explained() -> None:
    """Each field of a spec stands in its docstring, where people look for it."""
    missing = [
        f"{spec.__name__}.{name}"
        for spec in SPECS.values()
        for name in spec.model_fields
        if f"        {name}: " not in (spec.__doc__ or "").replace("    Attributes", "")
    ]
    assert missing == []
