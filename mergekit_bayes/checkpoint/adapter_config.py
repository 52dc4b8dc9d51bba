"""`adapter_config.json`: the rank and scaling of each adapted module, and what is not plain LoRA.

An adapter is read only if its effect is known to be W + s B A for every adapted weight W. What changes that
rule, or changes W itself before training, is refused with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_bayes.checkpoint.files import brief, shown
from mergekit_bayes.errors import CheckpointError

_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales every column of W + s B A, so its effect is not a sum of weights",
    "lora_bias": "a bias on B changes the layer's bias, which no B A expresses",
    "target_parameters": "updates of raw parameters (experts of a mixture) are stored in another layout",
    "trainable_token_indices": "trained token rows are stored apart from the embedding",
    "layer_replication": "replicated layers share one base weight and train several updates of it",
    "alora_invocation_tokens": "activated LoRA applies only after its invocation tokens",
    "use_qalora": "QA-LoRA averages groups of inputs before A",
    "use_bdlora": "block-diagonal factors are stored in another layout",
    "arrow_config": "Arrow routes every token to other adapters",
    "kasa_config": "KaSA puts a diagonal between B and A and truncates W",
    "velora_config": "VeLoRA is not known to leave W + s B A unchanged",
    "monteclora_config": "MonteCLoRA samples its factors around further parameters",
}
_KNOWN_VARIANT_KEYS = frozenset({"use_rslora", "loftq_config", "eva_config", "corda_config", "lora_ga_config"})
_KNOWN_VARIANT_KEYS |= {"megatron_config", "runtime_config"}
_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraRule:
    """How the factors of one module enter its weight.

    Attributes:
        rank: r, the inner dimension of B A.
        scaling: s in dW = s B A, that is alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    """

    rank: int
    scaling: float


def check_config(path: Path, config: Mapping[str, object]) -> list[CheckpointError]:
    """Returns every reason why an adapter configuration is invalid or not plain LoRA.

    Args:
        path: the file, for messages.
        config: its content.
    """
    faults: list[str] = []
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {brief(config.get('peft_type'))}; expected LORA, the only kind supported")
        return [CheckpointError(f"{shown(path)}: {faults[0]}")]
    for key, reason in _REFUSED.items():
        if config.get(key):
            faults.append(f"{key} is {brief(config[key])}, which is not supported: {reason}")
    for key, value in config.items():
        variant = key.startswith("use_") or key.endswith("_config")
        if variant and value and key not in _REFUSED and key not in _KNOWN_VARIANT_KEYS:
            faults.append(f"{shown(key)} is {brief(value)}; expected a plain LoRA adapter without it")
    if config.get("bias", "none") != "none":
        faults.append(f"bias is {brief(config['bias'])}; expected none: trained biases are not part of B A")
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS:
        reason = "this initialisation changes the base weights; convert the adapter to plain LoRA when saving it"
        faults.append(f"init_lora_weights is {brief(init)}, which is not supported: {reason}")
    faults += _value_faults(config)
    return [CheckpointError(f"{shown(path)}: {fault}") for fault in faults]


def lora_rule(config: Mapping[str, object], module: str) -> LoraRule:
    """Returns the rank and scaling of one module, found as PEFT finds them.

    A key of `rank_pattern` or `alpha_pattern` is a regular expression that must match the end of the
    module's path, from a dot or from the start; the first key that matches wins.

    Args:
        config: a configuration in which `check_config` found no fault.
        module: path of the module in the base model.
    """
    rank = int(_from_pattern(config, "rank_pattern", module, config.get("r", 8)))
    alpha = _from_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    return LoraRule(rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _from_pattern(config: Mapping[str, object], key: str, module: str, default: object) -> float:
    pattern = config.get(key) or {}
    assert isinstance(pattern, dict)  # checked by check_config
    matching = (text for text in pattern if re.match(rf"(.*\.)?({text})$", module))
    value = pattern.get(next(matching, module), default)
    assert isinstance(value, int | float)  # checked by check_config
    return value


def _value_faults(config: Mapping[str, object]) -> list[str]:
    faults = [
        f"{key} is {brief(config[key])}; expected true or false"
        for key in ("use_rslora", "fan_in_fan_out")
        if not isinstance(config.get(key, False), bool)
    ]
    checks = (
        ("r", "rank_pattern", _is_rank, "a whole number >= 1"),
        ("lora_alpha", "alpha_pattern", _is_alpha, "a finite number"),
    )
    for key, pattern_key, check, expected in checks:
        if key in config and not check(config[key]):
            faults.append(f"{key} is {brief(config[key])}; expected {expected}")
        faults += _pattern_faults(pattern_key, config.get(pattern_key) or {}, check, expected)
    return faults


def _pattern_faults(key: str, pattern: object, check: Callable[[object], bool], expected: str) -> list[str]:
    if not isinstance(pattern, dict):
        return [f"{key} is {brief(pattern)}; expected an object from module patterns to numbers"]
    faults = [
        f"{key}[{shown(text)}] is {brief(value)}; expected {expected}"
        for text, value in pattern.items()
        if not check(value)
    ]
    for text in pattern:
        try:
            re.compile(rf"(.*\.)?({text})$")
        except (re.error, RecursionError, OverflowError) as error:
            faults.append(f"{key}[{shown(text)}] is not a regular expression: {error}")
    return faults


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
