"""LoRA factors beside a frozen model, by PEFT, with every name of the recipe accounted for.

PEFT passes over a name in `target_modules` that fits nothing as long as another fits, and does the same in patterns and
lists of layers. What passes over a misspelt name trains something else than was asked.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.errors import ModelError
from mergekit_bayes.model.library import FAILURES, failure, seeded

if TYPE_CHECKING:
    from mergekit_bayes.recipe.adapter import AdapterSpec

ADAPTER_NAME = "default"

_ALL_LINEAR = "all-linear"
_TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


def add_lora(model: Any, spec: AdapterSpec, *, task: str, whole: Sequence[str], seed: int) -> Any:
    """Freezes a model and adds trainable factors in float32.

    Args:
        model: from `from_pretrained`; changed in place.
        spec: which factors.
        task: `causal_lm` or `sequence_classification`.
        whole: modules that are trained whole beside those the recipe names: a classification head.
        seed: decides the factors' starting values; the same adapter on the same base starts from the same A.

    Returns:
        The PEFT model.

    Raises:
        ModelError: a name in the recipe fits no module, a module cannot be adapted, or PEFT refuses.
    """
    import peft

    names = [name for name, _ in model.named_modules() if name]
    saved = list(dict.fromkeys([*(spec.modules_to_save or ()), *whole]))
    raise_if_any(_unknown_names(spec, names, [_type_name(model)]))
    frozen_dtypes = {name: _dtype(model.get_submodule(name)) for name in _reached(saved, names)}
    options = _options(spec, saved or None)
    if isinstance(spec.target_modules, str) and spec.target_modules.lower() == _ALL_LINEAR:
        # PEFT picks layers among short names only
        picky = spec.layers_to_transform is not None
        options["target_modules"] = _linear_modules(model, names, apart=_reached(saved, names), short_only=picky)
    with seeded(seed), warnings.catch_warnings():
        # PEFT settles how a layer stores its weight by the layer, whatever the recipe has, and merges do likewise
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="The following .* keys did not match")  # refused below
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=_TASKS[task], **options), ADAPTER_NAME)
        except FAILURES as error:
            raise failure("adapter: PEFT cannot add the factors", error) from error
    raise_if_any([*_unadaptable(adapted), *_without_effect(spec, adapted)])
    for name, dtype in frozen_dtypes.items():
        _keep_float32(adapted, name, dtype, inside=not any(_under(name, each) for each in whole))
    return adapted


def adapted_modules(model: Any) -> dict[str, Any]:
    """The modules that have factors, by their name in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def scalings(model: Any) -> set[float]:
    """The scalings s of dW = s B A that occur."""
    return {float(module.scaling[ADAPTER_NAME]) for module in adapted_modules(model).values()}


def raise_if_any(problems: Iterable[str]) -> None:
    """Raises all problems with an adapter as one error.

    Raises:
        ModelError: there are some.
    """
    lines = [f"adapter.{problem}" for problem in problems]
    if lines:
        raise ModelError("\n".join(lines))


def _options(spec: AdapterSpec, saved: list[str] | None) -> dict[str, Any]:
    """Arguments of `LoraConfig`: the recipe's own values, as the types that PEFT expects and writes."""
    options = {name: _plain(getattr(spec, name)) for name in type(spec).model_fields}
    alpha = float(spec.lora_alpha)
    return {**options, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "modules_to_save": saved}


def _linear_modules(model: Any, names: Sequence[str], *, apart: Sequence[str], short_only: bool) -> list[str]:
    """What `all-linear` means: by short names if those reach nothing else, else by full ones.

    PEFT's own reading includes the fused experts of some architectures, whose factors are no matrices.
    """
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    found = [name for name in names if _is_linear(modules[name]) and modules[name] is not head]
    found = [name for name in found if name not in _below(found, apart)]
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() > 2 and "expert" in name]
    if experts:
        warnings.warn(
            f"adapter.target_modules: all-linear leaves out {len(experts)} fused experts such as {experts[0]}, which "
            "are no linear layers; they stay as they are",
            stacklevel=2,
        )
    short = sorted({name.rpartition(".")[2] for name in found})
    reached = [name for name in names if any(_ends_in(name, each) for each in short)]
    return short if short_only or set(reached) - set(_below(reached, apart)) == set(found) else found


def _below(names: Iterable[str], others: Sequence[str]) -> list[str]:
    return [name for name in names if any(_under(name, other) for other in others)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _unknown_names(spec: AdapterSpec, names: Sequence[str], own: Sequence[str]) -> Iterator[str]:
    """Names of modules in the recipe that fit none, each with the nearest one that exists."""
    short = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(spec, key)
        for name in value if isinstance(value, tuple) else ():
            if not any(_ends_in(module, name) for module in names):
                near = difflib.get_close_matches(name, short, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected names such as {listed(short, 12)}"
                yield f"{key}: {shown(name)} fits no module of {own[0]}; {hint}"


def _unadaptable(model: Any) -> Iterator[str]:
    for name, module in adapted_modules(model).items():
        factors = [p for key, p in module.named_parameters() if "lora_" in key]
        if not _is_linear(_base_layer(module)) and not isinstance(_base_layer(module), nn.Embedding):
            kind = type(_base_layer(module)).__name__
            yield f"target_modules: {name} is a {kind}; expected linear layers and embeddings, which merges know"
        elif any(factor.dim() != 2 for factor in factors):
            yield f"target_modules: {name} has factors that are no matrices; expected a linear layer or an embedding"


def _base_layer(module: Any) -> nn.Module:
    layer = module.get_base_layer()
    assert isinstance(layer, nn.Module)
    return layer


def _without_effect(spec: AdapterSpec, model: Any) -> Iterator[str]:
    """Entries of the recipe that chose no module among the adapted ones."""
    adapted = list(adapted_modules(model))
    if not adapted:
        yield "target_modules: fits no module; expected at least one"
    if isinstance(spec.target_modules, tuple):
        for name in spec.target_modules:
            if not any(_ends_in(module, name) for module in adapted):
                yield f"target_modules: every module that {shown(name)} fits is left out by another key of the adapter"
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in adapted):
                yield f"{key}: {shown(pattern)} fits no adapted module; expected one such as {listed(adapted, 1)}"
    layers = spec.layers_to_transform
    for layer in (layers,) if isinstance(layers, int) else layers or ():
        if not any(f".{layer}." in f".{module}" for module in adapted):
            yield f"layers_to_transform: there is no adapted module in layer {layer}"


def _reached(entries: Iterable[str], names: Sequence[str]) -> list[str]:
    """The outermost modules that `modules_to_save` reaches."""
    found = [name for name in names if any(_ends_in(name, entry) for entry in entries)]
    return [name for name in found if not any(_under(name, other) and name != other for other in found)]


def _ends_in(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _under(module: str, other: str) -> bool:
    return f"{module}.".startswith(f"{other}.")


def _type_name(model: Any) -> str:
    return type(model).__name__


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _keep_float32(model: Any, name: str, dtype: torch.dtype | None, *, inside: bool) -> None:
    """Trains a module that is stored whole in float32, inside a model that computes in another type.

    Args:
        model: the PEFT model.
        name: of the module in the base model.
        dtype: of the frozen original.
        inside: whether what follows it expects the original's type; a head's output may stay float32.
    """
    wrapper = model.get_submodule(f"base_model.model.{name}")
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
