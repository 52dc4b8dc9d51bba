"""The names that a model's weights have in files: which parameter in memory is the one a sidecar describes.

A file and the model loaded from it do not agree on names. PEFT leaves the adapter's own name (`default`) and the
wrappers of `modules_to_save` out of its files, transformers renames some architectures while loading, a model without
its head lacks the prefix under which a model with a head stores it, and a tied weight has one name in the file and
two in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.errors import EvaluateError

__all__ = ["Weights", "check_adapter", "updated_weights_of", "weights_of"]

_HOLDERS = ("lora_A", "lora_embedding_A", "modules_to_save")
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Weights:
    """The weights of a model by all names under which a file may hold them.

    Attributes:
        parameters: every name, in files and in memory, to the parameter; several names can share one.
        trained: one name, that in files, of each parameter a posterior should cover: of an adapter all it has, of a
            model on its own those that require gradients.
        still: names of buffers, such as running averages: part of the model, but nothing a posterior is about.
        converted: names in files of tensors that are only a part of a parameter in memory.
        adapter: name of the adapter these belong to; None for a model on its own.
    """

    parameters: Mapping[str, nn.Parameter]
    trained: tuple[str, ...]
    still: frozenset[str]
    converted: frozenset[str]
    adapter: str | None

    def file_name(self, name: str) -> str:
        """Returns the name that PEFT's file has for a factor under any of its names; any other name as it is."""
        if self.adapter is None:
            return name
        parameter = self.parameters[name]
        return next(candidate for candidate in self.trained if self.parameters[candidate] is parameter)


def weights_of(model: nn.Module, adapter: str | None = None) -> Weights:
    """Finds the names of a model's weights.

    Args:
        model: a transformers or PEFT model, or any module; wrapped by DistributedDataParallel or torch.compile or not.
        adapter: which adapter, where a PEFT model has several.

    Raises:
        EvaluateError: there is no such adapter, or several to choose from.
    """
    model = _unwrapped(model)
    adapters = getattr(model, "peft_config", None) or {}
    if not adapters:
        if adapter is not None:
            raise EvaluateError(f"{type(model).__name__}: has no adapter; expected one named {shown(adapter)}")
        return _model_weights(model)
    chosen = _chosen(model, adapter, sorted(adapters))
    check_adapter(model, chosen)
    return _adapter_weights(model, chosen)


def updated_weights_of(model: nn.Module, adapter: str | None = None) -> Weights:
    """Finds the weights of the base that an adapter changes, and those that it stores whole.

    They have the names that precisions in product space have: those of the base's weights.

    Args:
        model: a PEFT model, or a transformers model that loaded an adapter; wrapped or not.
        adapter: which adapter, where there are several.

    Raises:
        EvaluateError: there is no such adapter, or several to choose from.
    """
    model = _unwrapped(model)
    adapters = getattr(model, "peft_config", None) or {}
    if not adapters:
        seen = f"{type(model).__name__}: has no adapter"
        raise EvaluateError(f"{seen}; expected the one whose updates the precisions describe, not merged into its base")
    chosen = _chosen(model, adapter, sorted(adapters))
    check_adapter(model, chosen)
    own = _adapter_weights(model, chosen)
    names = (name for name in own.trained if not any(f".{factor}" in name for factor in _FACTORS))
    found = {name.removeprefix(_ADAPTER_PREFIX): own.parameters[name] for name in names}
    for path, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and _adapts(module, chosen):
            found[f"{path.removeprefix(_ADAPTER_PREFIX)}.weight"] = base.get_parameter("weight")
    return Weights(found, tuple(sorted(found)), frozenset(), frozenset(), chosen)


def check_adapter(model: nn.Module, adapter: str | None) -> None:
    """Checks that what the model computes depends on the factors of an adapter.

    Raises:
        EvaluateError: the adapter is merged into the weights, switched off, or not among the active ones.
    """
    for name, module in model.named_modules():
        if adapter is None or not _adapts(module, adapter):
            continue
        where = f"adapter {shown(adapter)}: layer {shown(name)}"
        if getattr(module, "merged", False):
            raise EvaluateError(
                f"{where} has it merged into its weight; expected factors in use; call unmerge_adapter()"
            )
        if getattr(module, "disable_adapters", False):
            raise EvaluateError(f"{where} has its adapters disabled; expected them in use")
        active = getattr(module, "active_adapters", [adapter])
        if adapter not in active:
            raise EvaluateError(f"{where} uses {listed(active) or 'none'}; call set_adapter({adapter!r}) first")


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return _unwrapped(compiled) if isinstance(compiled, nn.Module) else model


def _adapts(module: nn.Module, adapter: str) -> bool:
    return adapter in {name for holder in _HOLDERS for name in _names_held(getattr(module, holder, None))}


def _names_held(held: object) -> Iterator[str]:
    if isinstance(held, nn.ModuleDict | nn.ParameterDict):
        yield from held.keys()


def _used(model: nn.Module, adapter: str) -> bool:
    holders = [module for module in model.modules() if _adapts(module, adapter)]
    return any(adapter in getattr(module, "active_adapters", ()) for module in holders)


def _chosen(model: nn.Module, adapter: str | None, present: list[str]) -> str:
    if adapter is None and len(present) > 1:
        present = [name for name in present if _used(model, name)] or present
    if adapter is None and len(present) == 1:
        return present[0]
    if adapter not in present:
        seen = f"{type(model).__name__}: has the adapters {listed(present)}"
        wanted = "one of them as `adapter`" if adapter is None else f"{shown(adapter)} among them"
        raise EvaluateError(f"{seen}; expected {wanted}")
    return adapter


def _adapter_weights(model: nn.Module, adapter: str) -> Weights:
    from peft import get_peft_model_state_dict

    in_memory = dict(model.named_parameters(remove_duplicate=False))
    # with parameters instead of a state_dict this is PEFT's own account of its file: which tensors, under which names
    saved = get_peft_model_state_dict(
        model, state_dict=dict(in_memory), adapter_name=adapter, save_embedding_layers=False
    )
    # a transformers model that loaded an adapter itself lacks the prefix that the file has
    in_file = {name if name.startswith(_ADAPTER_PREFIX) else f"{_ADAPTER_PREFIX}{name}": p for name, p in saved.items()}
    trained = {id(parameter) for parameter in in_file.values()}
    aliases = {name: parameter for name, parameter in in_memory.items() if id(parameter) in trained}
    return Weights({**aliases, **in_file}, tuple(sorted(in_file)), frozenset(), frozenset(), adapter)


def _model_weights(model: nn.Module) -> Weights:
    in_memory = dict(model.named_parameters(remove_duplicate=False))
    in_file = _names_before_conversion(model, in_memory)
    whole = {id(parameter) for parameter in in_memory.values()}
    converted = frozenset(name for name, tensor in in_file.items() if id(tensor) not in whole)
    known = {name: parameter for name, parameter in in_file.items() if name not in converted}
    trained = tuple(sorted(name for name, parameter in known.items() if parameter.requires_grad))
    for name, parameter in {**in_memory, **known}.items():
        for alias in (name, *_other_prefix(model, name)):
            known.setdefault(alias, parameter)
    buffers = [name for name, _ in model.named_buffers()]
    still = frozenset(alias for name in buffers for alias in (name, *_other_prefix(model, name)))
    return Weights(known, trained, still, converted, None)


def _names_before_conversion(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return parameters
    from transformers.core_model_loading import revert_weight_conversion

    renamed: dict[str, nn.Parameter] = revert_weight_conversion(model, dict(parameters))
    return renamed


def _other_prefix(model: nn.Module, name: str) -> list[str]:
    """The name in the file of a model that has the head this one lacks, or lacks the one it has."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return []
    if not hasattr(model, prefix):
        return [f"{prefix}.{name}"]
    return [name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else []
