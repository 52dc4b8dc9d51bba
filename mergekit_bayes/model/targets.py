"""Which modules of a model an adapter section means, and every name in it that means none.

PEFT passes over a name in `target_modules` that fits nothing as long as another fits, and does the same in patterns and
lists of layers. What passes over a misspelt name trains something else than was asked.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from mergekit_bayes.checkpoint.files import listed, shown

if TYPE_CHECKING:
    from mergekit_bayes.recipe.adapter import AdapterSpec

__all__ = ["is_under", "linear_modules", "names_without_effect", "outermost", "unadaptable_modules", "unknown_names"]


def linear_modules(model: Any, *, apart: Sequence[str], short_only: bool) -> list[str]:
    """Returns what `all-linear` means: every linear layer but a language model's head.

    PEFT's own reading includes the fused experts of some architectures, whose factors are no matrices.

    Args:
        model: before it is adapted.
        apart: modules that are trained whole, which get no factors.
        short_only: whether layers will be picked, which PEFT does among short names only.

    Returns:
        Short names such as `q_proj` if those reach nothing else, else full ones; sorted.
    """
    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if not _is_under_any(name, apart)}
    found = {name for name, module in modules.items() if is_linear(module) and module is not head}
    experts = [name for name, parameter in model.named_parameters() if parameter.dim() > 2 and "expert" in name]
    if experts:
        warnings.warn(
            f"adapter.target_modules: all-linear leaves out {len(experts)} fused experts such as {experts[0]}, which "
            "are no linear layers; they stay as they are",
            stacklevel=2,
        )
    short = sorted({name.rpartition(".")[2] for name in found})
    reached = {name for name in modules if any(_ends_in(name, each) for each in short)}
    return short if short_only or reached == found else sorted(found)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix, whichever way round it stores it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def unknown_names(spec: AdapterSpec, model: nn.Module) -> Iterator[str]:
    """Names in a section that fit no module, each with the nearest one that exists.

    Args:
        spec: the section.
        model: before it is adapted.
    """
    names = [name for name, _ in model.named_modules() if name]
    short = sorted({last for name in names if not (last := name.rpartition(".")[2]).isdigit()})
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(spec, key)
        for name in value if isinstance(value, tuple) else ():
            if not any(_ends_in(module, name) for module in names):
                near = difflib.get_close_matches(name, short, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected names such as {listed(short, 12)}"
                yield f"{key}: {shown(name)} fits no module of {type(model).__name__}; {hint}"


def unadaptable_modules(adapted: Mapping[str, Any]) -> Iterator[str]:
    """Modules that PEFT adapts in a way that no merge knows.

    Args:
        adapted: modules with factors, by name.
    """
    for name, module in adapted.items():
        layer = module.get_base_layer()
        factors = [parameter for key, parameter in module.named_parameters() if "lora_" in key]
        if not (is_linear(layer) or isinstance(layer, nn.Embedding)) or any(f.dim() != 2 for f in factors):
            kind = type(layer).__name__
            yield f"target_modules: {name} is a {kind}; expected linear layers and embeddings, which merges know"


def names_without_effect(spec: AdapterSpec, adapted: Iterable[str]) -> Iterator[str]:
    """Entries of a section that chose nothing among the modules that got factors.

    Args:
        spec: the section.
        adapted: their names.
    """
    modules = list(adapted)
    for name in spec.target_modules if isinstance(spec.target_modules, tuple) else ():
        if not any(_ends_in(module, name) for module in modules):
            yield f"target_modules: every module that {shown(name)} fits is left out by another key of the adapter"
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in modules):
                yield f"{key}: {shown(pattern)} fits no adapted module; expected one such as {listed(modules, 1)}"
    layers = spec.layers_to_transform
    for layer in (layers,) if isinstance(layers, int) else layers or ():
        if not any(f".{layer}." in f".{module}" for module in modules):
            yield f"layers_to_transform: there is no adapted module in layer {layer}"


def outermost(entries: Iterable[str], model: nn.Module) -> list[str]:
    """Names of the modules that entries of `modules_to_save` reach, without those inside another one."""
    wanted = tuple(entries)
    found = [name for name, _ in model.named_modules() if any(_ends_in(name, entry) for entry in wanted)]
    return [name for name in found if not _is_under_any(name, [other for other in found if other != name])]


def is_under(module: str, other: str) -> bool:
    """Whether a module is another one, or lies in it."""
    return f"{module}.".startswith(f"{other}.")


def _is_under_any(module: str, others: Sequence[str]) -> bool:
    return any(is_under(module, other) for other in others)


def _ends_in(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")
