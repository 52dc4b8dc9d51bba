"""Whether the weight that a LoRA update changes is stored as (out, in) or as (in, out).

PEFT keeps one `fan_in_fan_out` for a whole adapter and overwrites it with what the layer adapted last
needs, so the saved value is wrong for some modules of an adapter on GPT-2 that also adapts the head. The
base's shapes know better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from mergekit_bayes.checkpoint.adapter import Adapter, LoraModule
from mergekit_bayes.checkpoint.header import TensorInfo


def orient(adapter: Adapter, base: Mapping[str, TensorInfo]) -> Adapter:
    """Returns the adapter with `transposed` decided by the base wherever the base can decide it.

    The shape of the base weight settles a module that is not square. A square one follows its layer: a
    weight whose bias is as long as its second dimension, not its first, is stored transposed, and so are
    its neighbours. Without such evidence the configuration stands.

    Args:
        adapter: as opened.
        base: the base's tensors, whose names may lack the model's outermost prefix. A module whose weight
            is not there, or fits in neither orientation, is left as it is: refusing it is the plan's part.
    """
    votes = _votes(base)
    modules = {}
    for name, module in adapter.modules.items():
        target = adapter.base_tensor(name)
        found = next((key for key in (target, target.partition(".")[2]) if key in base), None)
        modules[name] = module if found is None else _oriented(module, base[found], votes.get(_layer(found)))
    return replace(adapter, modules=MappingProxyType(modules))


def transposed_weights(base: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the weights of linear layers that a checkpoint stores as (in, out).

    A bias as long as the second dimension of its weight, not the first, says so; a square weight, or one without a
    bias, follows its layer.

    Args:
        base: the tensors of the checkpoint.
    """
    votes = _votes(base)
    found = set()
    for name, info in base.items():
        if len(info.shape) == 2 and name.endswith(".weight"):
            bias = base.get(f"{name.removesuffix('.weight')}.bias")
            sizes = () if bias is None or info.shape[0] == info.shape[1] else bias.shape
            told = sizes == info.shape[1:] if sizes in (info.shape[:1], info.shape[1:]) else votes.get(_layer(name))
            found |= {name} if told else set()
    return frozenset(found)


def _votes(base: Mapping[str, TensorInfo]) -> dict[str, bool]:
    """Layers whose biases agree on how weights are stored; True for transposed."""
    votes: dict[str, set[bool]] = {}
    for name, info in base.items():
        bias = base.get(f"{name.removesuffix('.weight')}.bias") if name.endswith(".weight") else None
        if bias is None or len(info.shape) != 2 or len(bias.shape) != 1 or info.shape[0] == info.shape[1]:
            continue
        if bias.shape[0] in info.shape:
            votes.setdefault(_layer(name), set()).add(bias.shape[0] == info.shape[1])
    return {layer: seen.pop() for layer, seen in votes.items() if len(seen) == 1}


def _layer(name: str) -> str:
    """The path up to its first number, such as `h.0`; the whole name if it has none."""
    parts = name.split(".")
    end = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: end + 1])


def _oriented(module: LoraModule, weight: TensorInfo, vote: bool | None) -> LoraModule:
    out_features, in_features = module.b.shape[0], module.a.shape[1]
    if module.kind == "embedding":
        return module
    if out_features == in_features:
        return module if vote is None else replace(module, transposed=vote)
    if weight.shape not in ((out_features, in_features), (in_features, out_features)):
        return module
    return replace(module, transposed=weight.shape == (in_features, out_features))
