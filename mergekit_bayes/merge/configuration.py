"""config.json or adapter_config.json of the output: the donor's, with what the merge changed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import cast

from mergekit_bayes.checkpoint.dtypes import DTYPES, dtype_named
from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import Layout, ModuleStep, Step
from mergekit_bayes.merge.task import task_of

COSMETIC = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"})
"""Keys of config.json in which inputs may differ without anyone needing to know."""


def output_configuration(setting: Setting, layout: Layout) -> dict[str, object]:
    """Configuration of the output.

    Args:
        setting: the recipe and its inputs; differences between configurations are added to its notes.
        layout: what is written.

    Returns:
        The content of config.json (space full) or adapter_config.json.
    """
    if setting.space == "full":
        return _dense_configuration(setting, layout)
    return _adapter_configuration(setting, layout.steps)


def _dense_configuration(setting: Setting, layout: Layout) -> dict[str, object]:
    donor = setting.base if setting.base is not None else setting.sources[0]
    assert donor.checkpoint is not None  # a dense plan has a dense donor
    config = copy.deepcopy(dict(donor.checkpoint.config))
    config.pop("_name_or_path", None)
    asked = setting.recipe.out_dtype or setting.recipe.dtype
    if asked is not None:
        _set_everywhere(config, ("dtype", "torch_dtype"), DTYPES[dtype_named(asked)].torch_name)
    if layout.untied:
        config["tie_word_embeddings"] = False
        _set_everywhere(config, ("tie_word_embeddings",), False)
    # A head means what the sources were trained for; a new one makes the base's model one of theirs.
    settled = setting.task.settings if layout.fresh else setting.task.label_settings
    if settled.keys() >= {"id2label"}:
        config.pop("num_labels", None)  # follows from the labels
        _note_labels(setting, donor)
    config.update(settled)
    for source in setting.sources:
        _note_differences(setting, donor, source, settled=settled.keys())
    return config


def _note_labels(setting: Setting, donor: Input) -> None:
    theirs = task_of(donor).labels
    if theirs is not None and theirs != setting.task.labels:
        setting.notes.append(
            f"config.json: the labels of {donor.label} are {listed(theirs)}; the output has those of the sources"
        )


def _set_everywhere(config: dict[str, object], keys: tuple[str, ...], value: object) -> None:
    """Replace a key where it occurs, nested configurations (vision, text) included."""
    for key, found in config.items():
        if key in keys:
            config[key] = value
        elif isinstance(found, dict):
            _set_everywhere(found, keys, value)


def _note_differences(setting: Setting, donor: Input, source: Input, *, settled: Collection[str]) -> None:
    if source.checkpoint is None or donor.checkpoint is None or source.checkpoint is donor.checkpoint:
        return
    ours, theirs = donor.checkpoint.config, source.checkpoint.config
    for key in sorted((set(ours) | set(theirs)) - COSMETIC - set(settled)):
        if ours.get(key) != theirs.get(key):
            setting.notes.append(
                f"config.json: {key} is {ours.get(key)!r} in {donor.label}, {theirs.get(key)!r} in {source.label}; "
                f"the output has that of {donor.label}"
            )


def _adapter_configuration(setting: Setting, steps: Sequence[Step]) -> dict[str, object]:
    """A plain LoRA configuration: one rank, scaling 1, nothing that only some readers of adapters understand."""
    configs = [source.adapter.config for source in setting.sources if source.adapter]
    modules = [step.name for step in steps if isinstance(step, ModuleStep)]
    rank = max((step.rank for step in steps if isinstance(step, ModuleStep)), default=1)
    base, revision = _named_base(setting, configs)
    task_type = _shared(setting, configs, "task_type")
    return {
        "auto_mapping": None if task_type else _shared(setting, configs, "auto_mapping"),
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": _saved_modules(setting, configs) or None,
        "peft_type": "LORA",
        "r": rank,
        "revision": revision,
        "target_modules": _targets(configs, modules),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def _named_base(setting: Setting, configs: list[Mapping[str, object]]) -> tuple[object, object]:
    """Name and revision of the base, for those who load the adapter by itself."""
    base = setting.base.checkpoint if setting.base is not None else None
    if base is not None:
        written = str(setting.recipe.base_model)
        return (written, None) if base.revision is None else (written.partition("@")[0], base.revision)
    names = [str(config["base_model_name_or_path"]) for config in configs if config.get("base_model_name_or_path")]
    if len(set(names)) > 1:
        listed = ", ".join(sorted(set(names)))
        setting.notes.append(f"the adapters name different bases ({listed}); the output names {names[0]}")
    first = next((config for config in configs if config.get("base_model_name_or_path")), configs[0])
    return first.get("base_model_name_or_path"), first.get("revision")


def _shared(setting: Setting, configs: list[Mapping[str, object]], key: str) -> object:
    """What the configurations that have this key say; the first one's value where they differ, with a note."""
    values = [config[key] for config in configs if config.get(key) is not None]
    if any(value != values[0] for value in values):
        setting.notes.append(f"adapter_config.json: {key} differs between the adapters; the output has {values[0]!r}")
    return values[0] if values else None


def _saved_modules(setting: Setting, configs: list[Mapping[str, object]]) -> list[str]:
    """Modules stored whole, by the sources' own names; PEFT stores some that no configuration names, tied heads."""
    named = {str(name) for config in configs for name in cast(list[str], config.get("modules_to_save") or [])}
    saved = {name for source in setting.sources if source.adapter for name in source.adapter.saved}
    owners = {name.rpartition(".")[0] for name in saved}
    used = {name for name in named if any(_reaches(name, owner) for owner in owners)}
    return sorted(used | {owner for owner in owners if not any(_reaches(name, owner) for name in used)})


def _reaches(name: str, module: str) -> bool:
    """Whether a name such as `score` or `model.score` means this module or one around it."""
    return f".{name}." in f".{module}."


def _targets(configs: list[Mapping[str, object]], modules: list[str]) -> list[str]:
    """The sources' own short names where they reach what was adapted and nothing else, else the full paths.

    A short name such as `q_proj` reaches every module that ends in it. So did the source that used it, unless its
    configuration picked layers or left modules out.
    """
    lists = [config.get("target_modules") for config in configs]
    picky = any(config.get(key) for config in configs for key in ("exclude_modules", "layers_to_transform"))
    names = sorted({str(name) for each in lists if isinstance(each, list) for name in each})
    reached = all(any(f".{module}".endswith(f".{name}") for name in names) for module in modules)
    return names if reached and not picky and all(isinstance(each, list) for each in lists) else modules
