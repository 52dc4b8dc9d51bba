"""Random fine-tuning recipes: valid ones survive the way to YAML and back, all others are refused and never crash."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import FinetuneRecipe, dump_yaml, load_recipe, parse_document
from mergekit_bayes.recipe.data import FORMAT_COLUMNS
from mergekit_bayes.recipe.finetune import SPECS
from mergekit_bayes.recipe.finetune_consistency import consistency_problems
from mergekit_bayes.recipe.problem import Places
from tests.recipe.test_properties import anything, words

shares = st.floats(0.001, 0.999)
rates = st.floats(1e-9, 9) | st.integers(1, 9)
counts = st.integers(1, 2**40)
dtypes = st.sampled_from(["bfloat16", "float16", "float32"])
names = st.lists(words, min_size=1, max_size=3)
flags = st.booleans()


def mapping(required: Mapping[str, st.SearchStrategy[Any]], **optional: st.SearchStrategy[Any]) -> Any:
    return st.fixed_dictionaries(dict(required), optional=optional)


learned = [format for format in FORMAT_COLUMNS if format != "multiple_choice"]
datasets = st.sampled_from([None, *learned]).flatmap(
    lambda format: mapping(
        {"path": words, "format": st.just(format)},
        name=words,
        split=words,
        columns=st.dictionaries(st.sampled_from(FORMAT_COLUMNS.get(str(format), ("text",))), words, max_size=2),
        weight=st.floats(0.1, 9),
        max_rows=counts,
    )
)
recipes = mapping(
    {
        "kind": st.just("finetune"),
        "model": words
        | mapping(
            {"path": words},
            task=st.sampled_from(["causal_lm", "sequence_classification"]),
            dtype=st.none() | dtypes,
            load_in_4bit=flags,
            load_in_8bit=flags,
            bnb_4bit_quant_type=st.sampled_from(["nf4", "fp4"]),
            bnb_4bit_use_double_quant=flags,
            bnb_4bit_compute_dtype=dtypes,
            attn_implementation=words,
        ),
        "data": mapping(
            {"train": words | datasets | st.lists(datasets, min_size=1, max_size=3)},
            eval=st.none() | words | datasets | st.lists(datasets, max_size=2),
            eval_fraction=st.none() | shares,
            max_length=st.integers(2, 2**20),
            long_rows=st.sampled_from(["truncate", "drop", "refuse"]),
            packing=flags,
            completion_only_loss=flags,
            append_eos=flags,
            chat_template=st.none() | words,
            labels=st.none() | st.lists(words, min_size=2, max_size=4, unique=True),
        ),
    },
    adapter=st.sampled_from([None, "lora"])
    | mapping(
        {},
        r=counts,
        lora_alpha=rates,
        lora_dropout=st.just(0) | shares,
        target_modules=st.none() | words | names,
        exclude_modules=words | names,
        use_rslora=flags,
        modules_to_save=st.none() | names,
        init_lora_weights=flags | st.just("gaussian"),
        rank_pattern=st.dictionaries(words, counts, max_size=2),
        alpha_pattern=st.dictionaries(words, rates, max_size=2),
        layers_to_transform=st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3),
        layers_pattern=words | names,
        fan_in_fan_out=flags,
        bias=st.just("none"),
    ),
    optimizer=st.sampled_from([None, "ivon", "adamw"])
    | mapping({"name": st.just("adamw")}, lr=rates, beta1=shares, beta2=shares, eps=rates, amsgrad=flags)
    | mapping(
        {},
        name=st.just("ivon"),
        lr=rates,
        ess=st.none() | rates,
        temperature=rates,
        hess_init=st.none() | rates,
        noise_to_weight=rates,
        beta1=shares,
        beta2=st.none() | st.just(1) | shares,
        weight_decay=st.just(0) | rates,
        mc_samples=st.integers(1, 9),
        hess_approx=st.sampled_from(["price", "gradsq"]),
        clip_radius=st.none() | rates,
        debias=flags,
        rescale_lr=flags,
        antithetic=flags,
        noise=st.sampled_from(["shared", "per_process"]),
    ),
    training=st.none()
    | mapping(
        {},
        num_train_epochs=rates,
        max_steps=st.just(-1) | counts,
        per_device_train_batch_size=counts,
        gradient_accumulation_steps=counts,
        lr_scheduler_type=st.sampled_from(["linear", "cosine", "constant", "cosine_with_min_lr"]),
        lr_scheduler_kwargs=st.none() | mapping({}, min_lr_rate=shares),
        warmup_steps=st.integers(0, 9) | shares,
        max_grad_norm=st.just(0) | rates,
        bf16=flags,
        fp16=flags,
        eval_steps=st.none() | counts,
        save_steps=st.none() | counts,
        save_total_limit=st.none() | counts,
        seed=st.integers(0, 2**63 - 1),
        data_seed=st.none() | st.integers(0, 9),
        resume_from_checkpoint=flags | words,
        report_to=st.sampled_from(["none", "wandb", [], ["mlflow", "tensorboard"]]),
    ),
    output=st.none()
    | mapping({}, path=words, precision=st.sampled_from(["float32", "bfloat16", False]), debias_precision=flags),
)


def settled(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without contradictions: each key that one is reported at is removed, each that is missing is added.

    What would be without effect goes too, because it is not written out.
    """
    added: dict[Any, object] = {"weight": 1.0, "min_lr_rate": 0.5}
    while problems := consistency_problems(recipe):
        *around, key = Places(data=recipe).as_written(problems[0].path)
        node: Any = recipe
        for step in around:
            if isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
            node = node[step]
        if isinstance(node, list) or key in node:
            del node[key]
        else:
            node[key] = added[key]
    training = recipe.get("training") or {}
    if training.get("max_steps", -1) > 0:
        training.pop("num_train_epochs", None)  # without effect, so it is not written out
    return recipe


def problems_of(data: dict[str, Any], *overrides: str) -> tuple[str, ...] | None:
    """What a recipe is refused with; None for one that is read."""
    try:
        load_recipe(data, overrides=overrides)
    except RecipeError as error:
        return error.problems
    return None


@given(recipes)
def test_a_recipe_survives_the_way_to_yaml_and_back(data: dict[str, Any]) -> None:
    data = settled(copy.deepcopy(data))
    if problems_of(data):  # what was removed was needed: a data set that was listed twice
        return
    recipe = load_recipe(data, expect=FinetuneRecipe)
    text = dump_yaml(recipe.resolved())
    again = load_recipe(parse_document(text, "again.yaml").data, expect=FinetuneRecipe)
    assert again == recipe
    assert dump_yaml(again.resolved()) == text


@given(recipes)
def test_a_random_recipe_is_read_or_refused(data: dict[str, Any]) -> None:
    problems = problems_of(data)
    assert problems is None or (problems and all(line.strip() and "\n" not in line for line in problems))


@given(
    st.dictionaries(
        st.sampled_from(["model", "adapter", "data", "optimizer", "training", "output"]) | st.text(max_size=5),
        anything
        | st.dictionaries(
            st.sampled_from(sorted({name for spec in SPECS.values() for name in spec.model_fields})), anything
        ),
        max_size=6,
    )
)
def test_any_mapping_is_read_or_refused(data: dict[str, Any]) -> None:
    problems = problems_of({**data, "kind": "finetune"})
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
