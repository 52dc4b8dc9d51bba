"""config.json or adapter_config.json of the output: the donor's, with what the merge changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

from mergekit_bayes.checkpoint.dtypes import DTYPES, dtype_named
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import ModuleStep, Step

COSMETIC = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"})
"""Keys of config.json in which inputs may differ without anyone needing to know."""


def output_configuration(setting: Setting, steps: list[Step], *, untied: bool) -> dict[str, object]:
    """Configuration of the output.

    Args:
        setting: the recipe and its inputs; differences between configurations are added to its notes.
        steps: the steps of the plan.
        untied: a head that the donor ties to its embedding is written on its own.

    Returns:
        The content of config.json (space full) or adapter_config.json.
    """
    if setting.space == "full":
        return _dense_configuration(setting, untied=untied)
    return _adapter_configuration(setting, steps)


def _dense_configuration(setting: Setting, *, untied: bool) -> dict[str, object]:
    donor = setting.base if setting.base is not None else setting.sources[0]
    assert donor.checkpoint is not None  # a dense plan has a dense donor
    config = copy.deepcopy(dict(donor.checkpoint.config))
    config.pop("_name_or_path", None)
    asked = setting.recipe.out_dtype or setting.recipe.dtype
    if asked is not None:
        _set_everywhere(config, ("dtype", "torch_dtype"), DTYPES[dtype_named(asked)].torch_name)
    if untied:
        config["tie_word_embeddings"] = False
        _set_everywhere(config, ("tie_word_embeddings",), False)
    for source in setting.sources:
        _note_differences(setting, donor, source)
    return config


def _set_everywhere(config: dict[str, object], keys: tuple[str, ...], value: object) -> None:
    """Replace a key where it occurs, nested configurations (vision, text) included."""
    for key, found in config.items():
        if key in keys:
            config[key] = value
        elif isinstance(found, dict):
            _set_everywhere(found, keys, value)


def _note_differences(setting: Setting, donor: Input, source: Input) -> None:
    if source.checkpoint is None or donor.checkpoint is None or source.checkpoint is donor.checkpoint:
        return
    ours, theirs = donor.checkpoint.config, source.checkpoint.config
    for key in sorted((set(ours) | set(theirs)) - COSMETIC):
        if ours.get(key) != theirs.get(key):
            setting.notes.append(
                f"config.json: {key} is {ours.get(key)!r} in {donor.label}, {theirs.get(key)!r} in {source.label}; "
                f"the output has that of {donor.label}"
            )


def _adapter_configuration(setting: Setting, steps: list[Step]) -> dict[str, object]:
    configs = [source.adapter.config for source in setting.sources if source.adapter]
    first = configs[0]
    modules = [step for step in steps if isinstance(step, ModuleStep)]
    rank = max((step.rank for step in modules), default=1)
    saved = sorted({name for config in configs for name in cast(list[str], config.get("modules_to_save") or [])})
    base = setting.recipe.base_model or first.get("base_model_name_or_path")
    named = {str(config.get("base_model_name_or_path")) for config in configs}
    if len(named) > 1:
        setting.notes.append(f"the adapters name different bases ({', '.join(sorted(named))}); the output names {base}")
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": rank,
        "revision": first.get("revision"),
        "target_modules": _targets(configs, modules),
        "task_type": first.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(configs: list[Mapping[str, object]], modules: list[ModuleStep]) -> list[str]:
    """The sources' own short list where they share one, else the full path of every adapted module.

    A short name such as `q_proj` reaches every module that ends in it, so it only describes the merge if all sources
    used the same list.
    """
    lists = [config.get("target_modules") for config in configs]
    first = lists[0]
    if isinstance(first, list) and all(isinstance(other, list) and set(other) == set(first) for other in lists):
        return sorted(str(name) for name in first)
    return [step.name for step in modules]
