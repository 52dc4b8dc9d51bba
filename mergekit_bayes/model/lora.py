"""LoRA factors beside a frozen model, by PEFT, and modules that are trained whole beside them.

What is trained is float32 whatever the frozen model is: updates are far smaller than what bfloat16 resolves.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_bayes.errors import ModelError
from mergekit_bayes.model.library import FAILURES, failure, hush_bitsandbytes, seeded
from mergekit_bayes.model.targets import (
    is_under,
    linear_modules,
    names_without_effect,
    outermost,
    unadaptable_modules,
    unknown_names,
)

if TYPE_CHECKING:
    from mergekit_bayes.recipe.adapter import AdapterSpec

ADAPTER_NAME = "default"

_PREFIX = "base_model.model."
_ALL_LINEAR = "all-linear"
_TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


def add_lora(model: Any, spec: AdapterSpec, *, task: str, whole: Sequence[str], seed: int) -> Any:
    """Freezes a model and adds trainable factors.

    Args:
        model: from `from_pretrained`; changed in place.
        spec: which factors.
        task: `causal_lm` or `sequence_classification`.
        whole: modules that are trained whole beside those the recipe names: a classification head.
        seed: decides the factors' starting values; the same adapter on the same base starts from the same A.

    Returns:
        The PEFT model.

    Raises:
        ModelError: names in the recipe fit no module, modules cannot be adapted, or PEFT refuses.
    """
    _raise(list(unknown_names(spec, model)))
    saved = list(dict.fromkeys([*(spec.modules_to_save or ()), *whole]))
    frozen_dtypes = {name: _dtype(model.get_submodule(name)) for name in outermost(saved, model)}
    options = _options(spec, saved)
    if isinstance(spec.target_modules, str) and spec.target_modules.lower() == _ALL_LINEAR:
        picks = spec.layers_to_transform is not None
        options["target_modules"] = linear_modules(model, apart=tuple(frozen_dtypes), short_only=picks)
    adapted = _with_factors(model, {"task_type": _TASKS[task], **options}, seed=seed)
    modules = adapted_modules(adapted)
    _raise([*unadaptable_modules(modules), *names_without_effect(spec, modules)])
    for name, dtype in frozen_dtypes.items():
        _train_in_float32(adapted, name, dtype, inside=not any(is_under(name, each) for each in whole))
    return adapted


def adapted_modules(model: Any) -> dict[str, Any]:
    """The modules that have factors, by their name in the base model."""
    return {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def _options(spec: AdapterSpec, saved: list[str]) -> dict[str, Any]:
    """Arguments of `LoraConfig`: the recipe's own values, as the types that PEFT expects and writes."""
    options = {name: _plain(getattr(spec, name)) for name in type(spec).model_fields}
    alpha = float(spec.lora_alpha)
    return {**options, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "modules_to_save": saved or None}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _with_factors(model: Any, options: Mapping[str, Any], *, seed: int) -> Any:
    hush_bitsandbytes()
    import peft

    with seeded(seed), warnings.catch_warnings():
        # PEFT settles how a layer stores its weight by the layer, whatever the recipe has, and merges do likewise
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="The following .* keys did not match")  # refused afterwards
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            return peft.get_peft_model(model, peft.LoraConfig(**options), ADAPTER_NAME)
        except FAILURES as error:
            raise failure("adapter: PEFT cannot add the factors", error) from error


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise ModelError("\n".join(f"adapter.{problem}" for problem in problems))


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _train_in_float32(model: Any, name: str, dtype: torch.dtype | None, *, inside: bool) -> None:
    """Lets a module that is stored whole compute in float32, inside a model that computes in another type.

    Args:
        model: the PEFT model.
        name: of the module in the base model.
        dtype: of the frozen original.
        inside: whether what follows it expects the original's type; a head's output may stay float32.
    """
    wrapper = model.get_submodule(f"{_PREFIX}{name}")
    trained = wrapper.modules_to_save[ADAPTER_NAME] if hasattr(wrapper, "modules_to_save") else None
    if trained is None or dtype in (None, torch.float32):
        return
    for parameter in trained.parameters():
        parameter.data = parameter.data.float()
    trained.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)
    if inside:
        trained.register_forward_hook(partial(_output_to, dtype))


def _inputs_to_float32(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tuple(map(_float32, args)), {key: _float32(value) for key, value in kwargs.items()}


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _output_to(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, torch.Tensor) and output.is_floating_point() else output
