"""Words of other trainers: each leads to a key that exists, and none of theirs is met with a shrug."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.finetune import SPECS
from mergekit_bayes.recipe.trainer_words import _HERE, _REFUSED, BY_PLACE, HERE, REFUSED, about_word

KEYS = {name for spec in SPECS.values() for name in spec.model_fields}

# TRL is not installed with the tests; these are the fields of its SFTConfig, ModelConfig and ScriptArguments
TRL = """
    model_init_kwargs chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token pad_token
    max_length max_seq_length shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of eval_packing
    completion_only_loss assistant_only_loss loss_type activation_offloading neftune_noise_alpha num_of_sequences
    model_name_or_path model_revision dtype trust_remote_code attn_implementation use_peft lora_r lora_alpha
    lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora
    load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage dataset_name
    dataset_config dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers
"""


def unknown(names: list[str]) -> list[str]:
    return [name for name in names if name not in KEYS | HERE.keys() | REFUSED.keys()]


def test_every_word_has_one_meaning() -> None:
    counts = Counter(word for table in (_HERE, _REFUSED) for words in table.values() for word in words.split())
    assert [word for word, count in counts.items() if count > 1] == []
    assert sorted(KEYS & counts.keys()) == []  # a key of the recipe is found by itself


@pytest.mark.parametrize("target", sorted({*HERE.values(), *BY_PLACE.values()}))
def test_every_word_leads_to_a_key_that_exists(target: str) -> None:
    paths = [path for path in re.findall(r"`([^`]*)`", target) if "@" not in path and "{" not in path]
    named = [path.split(":")[0].split(".") for path in paths if not path.startswith("--")]
    options = ["min_lr_rate", "flash_attention_2"]
    for path in named:
        place = tuple(path[:-1])
        known = [spec for at, spec in SPECS.items() if at == place or (place == ("optimizer",) and at[:1] == place)]
        inside = [spec for spec in SPECS.values() if len(path) == 1 and path[0] in spec.model_fields]
        assert path[-1] in options or inside or any(path[-1] in spec.model_fields for spec in known), path


def test_words_are_explained_wherever_they_are_written() -> None:
    for place in ("", "model", "data", "training", "optimizer", "adapter", "output"):
        assert about_word(place, "learning_rate") == "unknown key. Here it is `optimizer.lr`."
    assert about_word("model", "type") != about_word("data", "type")
    assert about_word("", "frobnicate") is None


@pytest.mark.parametrize(
    ("word", "start"), [("lora_r", "unknown key. Here"), ("use_dora", "not supported: only plain")]
)
def test_a_word_in_a_recipe(word: str, start: str) -> None:
    data = {"kind": "finetune", "model": "base", "data": {"train": "a.jsonl"}, "adapter": {word: 8}}
    with pytest.raises(RecipeError, match=re.escape(f"adapter.{word}: {start}")):
        load_recipe(data)


def test_the_words_of_trl_are_known() -> None:
    assert unknown(TRL.split()) == []


@pytest.mark.slow
def test_the_words_of_transformers_and_peft_are_known() -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    for config in (TrainingArguments, LoraConfig):
        assert unknown([field.name for field in dataclasses.fields(config)]) == []
    assert unknown([name for name in vars(BitsAndBytesConfig()) if not name.startswith("_")]) == []
