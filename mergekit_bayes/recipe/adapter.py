"""The section `adapter`: which LoRA factors are trained, in the names of PEFT's `LoraConfig`.

adapter: {r: 16, lora_alpha: 32, target_modules: [q_proj, v_proj]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import refusal, show
from mergekit_bayes.recipe.spec import Entries, Spec, checked

Names: TypeAlias = tuple[str, ...]

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "pissa_niter")


def _names(value: object) -> Names:
    return field.several(field.text)(value)


def _names_or_pattern(value: object) -> str | Names | None:
    if value is None or isinstance(value, str):
        return None if value is None else field.text(value)
    if not isinstance(value, list | tuple):
        raise refusal(f"expected a list of module names or a pattern, found {show(value)}.")
    return _names(value)


def _layers(value: object) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    check = field.integer(0)
    return field.several(check)(value) if isinstance(value, list | tuple) else check(value)


def _bias(value: object) -> Literal["none"]:
    if value != "none":
        reason = "a trained bias is no low-rank update, and merges of adapters have no place for it"
        raise refusal(f"expected `none`, found {show(value)}: {reason}.")
    return "none"


def _initialisation(value: object) -> bool | Literal["gaussian"]:
    if isinstance(value, str) and value.lower().startswith(_CHANGES_BASE):
        raise refusal(
            f"found {show(value)}, which changes the base's weights, so that adapters of one base no longer share it. "
            "Use true or `gaussian`."
        )
    if isinstance(value, str) and value != "gaussian":
        raise refusal(f"expected true, false or `gaussian`, found {show(value)}.")
    return "gaussian" if value == "gaussian" else field.boolean(value)


def _module_names(value: object) -> Names | None:
    return None if value is None else _names(value)


class AdapterSpec(Spec):
    """The low-rank update dW = s B A, s = lora_alpha / r (or lora_alpha / sqrt(r)).

    Attributes:
        r: rank.
        lora_alpha: numerator of the scaling s.
        lora_dropout: share of the inputs of A that is dropped in training.
        target_modules: `all-linear` (every linear layer but the head), names, one regular expression, or None for
            PEFT's choice for the architecture.
        exclude_modules: names or a regular expression that are left out of them.
        use_rslora: scale by lora_alpha / sqrt(r).
        modules_to_save: modules that are trained whole beside the factors.
        init_lora_weights: True: A uniform, B zero; `gaussian`: A normal, B zero; False: both random.
        rank_pattern: r for modules whose name matches.
        alpha_pattern: lora_alpha for modules whose name matches.
        layers_to_transform: only the layers of these numbers.
        layers_pattern: what the list of layers is called, where PEFT does not find it.
        fan_in_fan_out: weights are stored as (in, out), as GPT-2's are.
        bias: always `none`.
    """

    r: Annotated[int, checked(field.integer(1))] = 8
    lora_alpha: Annotated[float, checked(field.positive)] = 16
    lora_dropout: Annotated[float, checked(field.between(0, 1, below=True))] = 0.0
    target_modules: Annotated[str | Names | None, checked(_names_or_pattern)] = "all-linear"
    exclude_modules: Annotated[str | Names | None, checked(_names_or_pattern)] = None
    use_rslora: Annotated[bool, checked(field.boolean)] = False
    modules_to_save: Annotated[Names | None, checked(_module_names)] = None
    init_lora_weights: Annotated[bool | Literal["gaussian"], checked(_initialisation)] = True
    rank_pattern: Annotated[Entries[int], checked(field.entries(field.integer(1)))] = Entries()
    alpha_pattern: Annotated[Entries[float], checked(field.entries(field.positive))] = Entries()
    layers_to_transform: Annotated[int | tuple[int, ...] | None, checked(_layers)] = None
    layers_pattern: Annotated[str | Names | None, checked(_names_or_pattern)] = None
    fan_in_fan_out: Annotated[bool, checked(field.boolean)] = False
    bias: Annotated[Literal["none"], checked(_bias)] = "none"


def adapter_mapping(value: object) -> object:
    """The section written out; `lora` is one with PEFT's defaults."""
    if isinstance(value, str) and value.lower() == "lora":
        return {}
    if isinstance(value, str):
        raise refusal(f"found {show(value)}; training starts from new factors, an adapter is not continued.")
    if value is not None and not isinstance(value, AdapterSpec | Mapping):
        raise refusal(f"expected a mapping such as `{{r: 8}}`, or nothing to train all weights, found {show(value)}.")
    return value
