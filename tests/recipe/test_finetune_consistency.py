"""Keys of a fine-tuning recipe that exclude, need or silence each other: what is said, and what makes it right."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import FinetuneRecipe, load_recipe

DATA = {"train": "a.jsonl"}
CLASSES = {"path": "base", "task": "sequence_classification"}
TEXT = {"path": "a.txt", "format": "text"}
LABELLED = {"path": "a.jsonl", "format": "labelled"}
MIN_LR = {"lr_scheduler_type": "cosine_with_min_lr"}


def problems_of(sections: dict[str, Any]) -> tuple[str, ...]:
    """What a recipe of these sections is refused with; one that is read must also be read back."""
    try:
        recipe = load_recipe({"kind": "finetune", "model": "base", "data": DATA, **sections}, expect=FinetuneRecipe)
    except RecipeError as error:
        return error.problems
    assert load_recipe(recipe.resolved(), expect=FinetuneRecipe) == recipe
    return ()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "4 and 8 bits": (
        {"model": {"path": "base", "load_in_4bit": True, "load_in_8bit": True}, "adapter": {}},
        {"model": {"path": "base", "load_in_4bit": True, "load_in_8bit": False}, "adapter": {}},
        "model.load_in_8bit: 8 bits beside `load_in_4bit: true`; keep one of them.",
    ),
    "quantised weights that are trained": (
        {"model": {"path": "base", "load_in_8bit": True}},
        {"model": {"path": "base", "load_in_8bit": True}, "adapter": {}},
        "model.load_in_8bit: quantised weights cannot be trained; add an `adapter`, or load them whole.",
    ),
    "questions, from which nothing is learned": (
        {"data": {"train": {"path": "a.jsonl", "format": "multiple_choice"}}},
        {"data": {"train": {"path": "a.jsonl", "format": "prompt_completion"}}},
        "data.train.format: questions are evaluated, not learned; write right answers as `prompt_completion` rows.",
    ),
    "4-bit options for other weights": (
        {"model": {"path": "base", "bnb_4bit_compute_dtype": "bfloat16"}, "adapter": {}},
        {"model": {"path": "base", "bnb_4bit_compute_dtype": "bfloat16", "load_in_4bit": True}, "adapter": {}},
        "model.bnb_4bit_compute_dtype: has no effect without `load_in_4bit: true`.",
    ),
    "4-bit options at their default for other weights": (
        {"model": {"path": "base", "bnb_4bit_quant_type": "nf4"}, "adapter": {}},
        {"model": {"path": "base", "bnb_4bit_quant_type": "nf4", "load_in_4bit": True}, "adapter": {}},
        "model.bnb_4bit_quant_type: has no effect without `load_in_4bit: true`.",
    ),
    "float16 weights that are trained": (
        {"model": {"path": "base", "dtype": "float16"}},
        {"model": {"path": "base", "dtype": "float16"}, "adapter": {}},
        "model.dtype: weights that are trained need more range than float16 has; use float32, with "
        "`training.fp16: true` for speed, or bfloat16.",
    ),
    "bf16 and fp16": (
        {"training": {"bf16": True, "fp16": True}},
        {"training": {"bf16": False, "fp16": True}},
        "training.fp16: float16 beside `bf16: true`; keep one of them.",
    ),
    "the name of the layers without their numbers": (
        {"adapter": {"target_modules": ["q"], "layers_pattern": "blocks"}},
        {"adapter": {"target_modules": ["q"], "layers_pattern": "blocks", "layers_to_transform": 1}},
        "adapter.layers_pattern: has no effect without `layers_to_transform`.",
    ),
    "numbers of layers beside a pattern": (
        {"adapter": {"layers_to_transform": [0, 1]}},
        {"adapter": {"layers_to_transform": [0, 1], "target_modules": ["q"]}},
        "adapter.layers_to_transform: needs `target_modules` as a list of names; PEFT takes no pattern beside it.",
    ),
    "held-out data twice": (
        {"data": {**DATA, "eval": "b.jsonl", "eval_fraction": 0.1}},
        {"data": {**DATA, "eval": [], "eval_fraction": 0.1}},
        "data.eval_fraction: held-out rows beside `eval`; keep one of them.",
    ),
    "evaluations without held-out data": (
        {"training": {"eval_steps": 10}},
        {"training": {"eval_steps": 10}, "data": {**DATA, "eval_fraction": 0.1}},
        "training.eval_steps: nothing to evaluate on; set `data.eval` or `data.eval_fraction`.",
    ),
    "a weight of a held-out data set": (
        {"data": {**DATA, "eval": {"path": "b.jsonl", "weight": 1}}},
        {"data": {**DATA, "eval": {"path": "b.jsonl", "weight": None}}},
        "data.eval.weight: a share of the training mixture; each held-out data set is evaluated by itself. Remove it.",
    ),
    "held-out rows that are trained on": (
        {"data": {"train": ["c", "org/a"], "eval": {"path": "org/a", "split": "train"}}},
        {"data": {"train": ["c", "org/a"], "eval": {"path": "org/a", "split": "test"}}},
        "data.eval.path: the rows of `data.train[1]`; give another file or split, or `eval_fraction` instead of "
        "`eval`.",
    ),
    "a mixture of data sets with and without weight": (
        {"data": {"train": [{"path": "a", "weight": 1}, {"path": "b"}]}},
        {"data": {"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]}},
        "data.train[1].weight: missing; give every data set a weight, or none, and every row counts once.",
    ),
    "a data set listed twice": (
        {"data": {"train": [{"path": "a", "max_rows": 5}, "b", "a"]}},
        {"data": {"train": [{"path": "a", "columns": {"text": "x"}}, "b", "a"]}},
        "data.train[2]: the same rows as `data.train[0]`; list them once, with a larger `weight` if they count more.",
    ),
    "labels for next tokens": (
        {"data": {"train": LABELLED}},
        {"data": {"train": LABELLED}, "model": CLASSES},
        "data.train.format: labels are learned with `model.task: sequence_classification`.",
    ),
    "next tokens for labels": (
        {"data": {"train": "a", "eval": TEXT}, "model": CLASSES},
        {"data": {"train": "a", "eval": LABELLED | {"path": "b"}}, "model": CLASSES},
        "data.eval.format: `model.task: sequence_classification` learns from `labelled` rows.",
    ),
    "columns of another format": (
        {"data": {"train": {"path": "a", "format": "prompt_completion", "columns": {"text": "body"}}}},
        {"data": {"train": {"path": "a", "format": "prompt_completion", "columns": {"prompt": "body"}}}},
        "data.train.columns.text: no column of the format `prompt_completion`, which has `prompt` and `completion`.",
    ),
    "label names for next tokens": (
        {"data": {**DATA, "labels": ["a", "b"]}},
        {"data": {**DATA, "labels": ["a", "b"]}, "model": CLASSES},
        "data.labels: has no effect on `model.task: causal_lm`; labels are those of `sequence_classification`.",
    ),
    "packing for labels": (
        {"data": {**DATA, "packing": True}, "model": CLASSES},
        {"data": {**DATA, "packing": False}, "model": CLASSES},
        "data.packing: has no use for `model.task: sequence_classification`; remove it.",
    ),
    "a chat template for labels": (
        {"data": {**DATA, "chat_template": "c.jinja"}, "model": CLASSES},
        {"data": {**DATA, "chat_template": "c.jinja"}},
        "data.chat_template: has no use for `model.task: sequence_classification`; remove it.",
    ),
    "completions of plain text": (
        {"data": {"train": [TEXT], "completion_only_loss": True}},
        {"data": {"train": [TEXT, "b"], "completion_only_loss": True}},
        "data.completion_only_loss: plain text has no completions, all of it is learned; remove it, or use "
        "`prompt_completion` rows.",
    ),
    "long rows of packed text": (
        {"data": {"train": TEXT, "packing": True, "long_rows": "truncate"}},
        {"data": {"train": TEXT, "packing": False, "long_rows": "truncate"}},
        "data.long_rows: packed text is cut into rows that fit; remove it.",
    ),
    "one sample that should be a pair": (
        {"optimizer": {"antithetic": True}},
        {"optimizer": {"antithetic": True, "mc_samples": 2}},
        "optimizer.antithetic: samples come in pairs; set an even `mc_samples`, found 1.",
    ),
    "three samples that should be pairs": (
        {"optimizer": {"antithetic": True, "mc_samples": 3}},
        {"optimizer": {"antithetic": False, "mc_samples": 3}},
        "optimizer.mc_samples: samples come in pairs; set an even `mc_samples`, found 3.",
    ),
    "a curvature to begin with that is given already": (
        {"optimizer": {"hess_init": 1, "noise_to_weight": 0.1}},
        {"optimizer": {"ess": 1e3, "noise_to_weight": 0.1}},
        "optimizer.noise_to_weight: has no effect beside `hess_init`; remove one of them.",
    ),
    "a temperature that is given already": (
        {"optimizer": {"ess": 1e3, "temperature": 0.1}},
        {"optimizer": {"hess_init": 1, "temperature": 0.1}},
        "optimizer.temperature: has no effect beside `ess`; remove one of them.",
    ),
    "own noise with loss scaling": (
        {"optimizer": {"noise": "per_process"}, "training": {"fp16": True}},
        {"optimizer": {"noise": "per_process"}, "training": {"bf16": True}},
        "optimizer.noise: each process would skip other steps with `training.fp16`; use bf16, or noise: shared.",
    ),
    "a run that ends in its warm-up": (
        {"training": {"max_steps": 10, "warmup_steps": 10}},
        {"training": {"max_steps": 10, "warmup_steps": 9}},
        "training.warmup_steps: expected fewer steps than the run has (10), found 10.",
    ),
    "a schedule without its last rate": (
        {"training": MIN_LR},
        {"training": {**MIN_LR, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}},
        "training.lr_scheduler_kwargs.min_lr_rate: missing; `cosine_with_min_lr` ends at this share of `optimizer.lr`, "
        "such as 0.1.",
    ),
    "a last rate for another schedule": (
        {"training": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}},
        {"training": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {}}},
        "training.lr_scheduler_kwargs.min_lr_rate: has no effect without `lr_scheduler_type: cosine_with_min_lr`.",
    ),
    "warm-up to a constant": (
        {"training": {"lr_scheduler_type": "constant", "warmup_steps": 0.1}},
        {"training": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}},
        "training.warmup_steps: has no effect on `lr_scheduler_type: constant`; use `constant_with_warmup`.",
    ),
    "a limit of checkpoints that are not written": (
        {"training": {"save_total_limit": 2}},
        {"training": {"save_total_limit": 2, "save_steps": 10}},
        "training.save_total_limit: has no effect without `save_steps`: no checkpoint is kept before the end.",
    ),
    "the precision of AdamW": (
        {"optimizer": "adamw", "output": {"precision": "float32"}},
        {"optimizer": "adamw", "output": {"precision": False}},
        "output.precision: AdamW leaves no precision behind; use `optimizer: ivon`, or false.",
    ),
    "a debiased precision of AdamW": (
        {"optimizer": "adamw", "output": {"debias_precision": True}},
        {"optimizer": "adamw", "output": {}},
        "output.debias_precision: has no effect where no precision is written; remove it.",
    ),
    "a debiased precision that is not written": (
        {"output": {"precision": False, "debias_precision": True}},
        {"output": {"precision": "bfloat16", "debias_precision": True}},
        "output.debias_precision: has no effect where no precision is written; remove it.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_contradiction_is_refused(case: str) -> None:
    wrong, _, message = CASES[case]
    assert problems_of(wrong) == (message,)


@pytest.mark.parametrize("case", CASES)
def test_what_the_message_says_makes_it_right(case: str) -> None:
    _, right, _ = CASES[case]
    assert problems_of(right) == ()


def test_contradictions_are_reported_beside_faults_of_single_values() -> None:
    sections = {
        "model": {"path": 3, "load_in_4bit": True},
        "data": {"train": "a", "eval": "b", "eval_fraction": 2},
        "optimizer": {"lr": "fast", "antithetic": True},
        "training": {"epochs": 2, "bf16": True, "fp16": True},
    }
    assert {line.split(":")[0] for line in problems_of(sections)} == {
        "model.path", "model.load_in_4bit", "data.eval_fraction", "optimizer.lr", "optimizer.antithetic",
        "training.epochs", "training.fp16",
    }  # fmt: skip


def test_a_faulty_value_is_reported_once() -> None:
    faults = {
        "model": {"path": "base", "load_in_4bit": "x", "task": "y"},
        "data": {"train": [3, {"path": "a", "weight": 1}]},
        "training": {"max_steps": "z", "warmup_steps": "w", "lr_scheduler_type": "v"},
        "optimizer": {"antithetic": True, "mc_samples": "two"},
    }
    assert sorted(line.split(":")[0] for line in problems_of(faults)) == [
        "data.train[0]", "model.load_in_4bit", "model.task", "optimizer.mc_samples", "training.lr_scheduler_type",
        "training.max_steps", "training.warmup_steps",
    ]  # fmt: skip
