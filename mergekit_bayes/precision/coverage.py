"""Which parameters hooks on modules do not see all of.

A parameter may be used by another module than the one that owns it (attention that multiplies by the weight of its
output layer, a head that multiplies by the embedding's weight), or be owned by a module that does more than one thing
with it. A gradient without such a use would be wrong without a word. The graph that autograd records knows every use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.precision.observe import logits_of, prepared

__all__ = ["unseen_parameters"]


def unseen_parameters(
    model: nn.Module, inputs: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> list[str]:
    """Finds the parameters whose use in one forward pass is not the sum of calls of modules without children.

    Args:
        model: any module.
        inputs: of one row.
        parameters: to check, by name.

    Returns:
        Their names, in the order given; a parameter that is not used at all is not among them.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], bool]] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        plain = isinstance(output, Tensor) and bool(arguments) and isinstance(arguments[0], Tensor)
        calls.append((module, arguments, keywords, plain))

    chosen = {id(parameter) for parameter in parameters.values()}
    leaves = [
        module
        for module in model.modules()
        if not any(module.children()) and chosen & {id(each) for each in module.parameters(recurse=False)}
    ]
    with prepared(model, parameters.values()), torch.enable_grad():
        handles = [module.register_forward_hook(keep, with_kwargs=True) for module in leaves]
        try:
            used = _uses(logits_of(model, inputs))
        finally:
            for handle in handles:
                handle.remove()
        seen: Counter[int] = Counter()
        for module, arguments, keywords, plain in calls:
            if plain:
                detached = (each.detach() if isinstance(each, Tensor) else each for each in arguments)
                seen += _uses(module(*detached, **keywords))
    return [name for name, parameter in parameters.items() if used[id(parameter)] != seen[id(parameter)]]


def _uses(output: Tensor) -> Counter[int]:
    """How often each parameter, by its identity, enters the graph of an output."""
    found: Counter[int] = Counter()
    waiting: list[Any] = [output.grad_fn] if output.grad_fn is not None else []
    visited = {id(node) for node in waiting}
    kept = list(waiting)  # identities stay valid while nodes live
    while waiting:
        for node in _inputs(waiting.pop()):
            if hasattr(node, "variable"):
                found[id(node.variable)] += 1
            elif id(node) not in visited:
                visited.add(id(node))
                kept.append(node)
                waiting.append(node)
    return found


def _inputs(node: Any) -> Iterable[Any]:
    return (each for each, _ in node.next_functions if each is not None)
