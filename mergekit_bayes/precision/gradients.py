r"""The gradient of every row in one parameter, from what the modules that use it saw.

With input x_t and output gradient d_t at the places t of a row, the row's gradient is

    linear layer     W: sum_t d_t x_t^T        b: sum_t d_t        (transposed where W is stored so)
    embedding        W[x_t] += d_t
    any other        vmap(vjp) of the module alone, as a function of the parameter

and the sum of these over all uses of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from mergekit_bayes.precision.observe import Use
from mergekit_bayes.precision.targets import is_transposed

__all__ = ["Lookup", "Rule", "add_lookup_squares", "add_squares", "features", "rule_of", "weight_rule"]

Rule = Callable[[Use, int, slice], Tensor]
"""(use, rows of the chunk, which of them) to their gradients, (rows, *shape of the parameter)"""

_ENTRIES = 2**20
"""Entries of gradients formed at once: few enough for a cache, many enough not to wait for each row of a small layer"""


def features(use: Use, rows: int) -> tuple[Tensor, Tensor | None]:
    """Returns a linear layer's inputs (rows, places, in_features) and output gradients (rows, places, out_features)."""
    value, gradient = use.input, use.gradient
    if gradient is None:
        return value.reshape(rows, -1, value.shape[-1]), None
    return value.reshape(rows, -1, value.shape[-1]), gradient.reshape(rows, -1, gradient.shape[-1])


def weight_rule(*, transposed: bool = False) -> Rule:
    """Returns the rule for the weight of a linear layer, or for the update of one."""

    def rule(use: Use, rows: int, part: slice) -> Tensor:
        value, gradient = _both(use, rows, part)
        left, right = (value, gradient) if transposed else (gradient, value)
        return left.transpose(1, 2) @ right

    return rule


class Lookup:
    """The rule for an embedding.

    Args:
        size: entries of its table.
        padding: an entry that is never learnt, if there is one.
    """

    def __init__(self, size: int, padding: int | None = None) -> None:
        self.size = size
        self.padding = padding

    def __call__(self, use: Use, rows: int, part: slice) -> Tensor:
        """Returns the gradients of whole tables."""
        tokens, gradient = use.input.reshape(rows, -1)[part], _gradient(use, rows, part)
        if self.padding is not None:
            gradient = gradient * (tokens != self.padding).unsqueeze(-1)
        dense = gradient.new_zeros(len(tokens) * self.size, gradient.shape[-1])
        offset = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * self.size
        dense.index_add_(0, (tokens + offset).flatten(), gradient.flatten(0, 1))
        return dense.view(len(tokens), self.size, -1)


def rule_of(module: nn.Module, attribute: str) -> Rule:
    """Returns the rule for a parameter that a module without children has under this name."""
    plain = type(module).forward in (nn.Linear.forward, nn.Embedding.forward) or is_transposed(module)
    if plain and isinstance(module, nn.Embedding) and not module.scale_grad_by_freq:
        return Lookup(module.num_embeddings, module.padding_idx)
    if plain and not isinstance(module, nn.Embedding) and attribute == "weight":
        return weight_rule(transposed=is_transposed(module))
    if plain and not isinstance(module, nn.Embedding) and attribute == "bias":
        return lambda use, rows, part: _gradient(use, rows, part).sum(1)
    return _other_rule(module, attribute)


def add_squares(total: Tensor, uses: Sequence[tuple[Rule, Use]], rows: int) -> None:
    """Adds the squared gradients of all rows to a total.

    Args:
        total: shape of the parameter, or of its transpose where a rule says so; float32 or wider; changed.
        uses: every use of the parameter in the chunk, with the rule of the module that made it.
        rows: of the chunk.
    """
    known = [(rule, use) for rule, use in uses if use.gradient is not None]
    at_once = max(1, _ENTRIES // total.numel())
    for start in range(0, rows if known else 0, at_once):
        part = slice(start, start + at_once)
        gradient, *others = (rule(use, rows, part) for rule, use in known)
        for other in others:
            gradient += other
        if at_once == 1:
            total.addcmul_(gradient[0].to(total.dtype), gradient[0].to(total.dtype))
        else:
            total.add_(gradient.to(total.dtype).square_().sum(0))


def add_lookup_squares(total: Tensor, rule: Lookup, use: Use, rows: int) -> None:
    """As `add_squares` for the only use of an embedding, touching no more entries than a row looks up."""
    for row in range(rows if use.gradient is not None else 0):
        tokens, places = use.input.reshape(rows, -1)[row].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        gradient = _gradient(use, rows, slice(row, row + 1))[0].to(total.dtype)
        summed = total.new_zeros(len(tokens), gradient.shape[-1]).index_add_(0, places, gradient)
        if rule.padding is not None:
            summed[tokens == rule.padding] = 0
        total.index_add_(0, tokens, summed.square_())


def _other_rule(module: nn.Module, attribute: str) -> Rule:
    def gradient_of(arguments: tuple[Any, ...], keywords: dict[str, Any], sent: Tensor) -> Tensor:
        def call(parameter: Tensor) -> Any:
            return functional_call(module, {attribute: parameter}, arguments, keywords)

        backward = vjp(call, module.get_parameter(attribute).detach())[1]
        gradient: Tensor = backward(sent)[0]
        return gradient

    def rule(use: Use, rows: int, part: slice) -> Tensor:
        assert use.gradient is not None
        if rows == 1:
            return gradient_of(use.arguments, dict(use.keywords), use.gradient).unsqueeze(0)

        def of_rows(value: Any) -> bool:
            return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows

        def cut(value: Any) -> Any:  # modules may count on a dimension for rows, so each row keeps one
            return value[part].unsqueeze(1) if of_rows(value) else value

        def dimension(value: Any) -> int | None:
            return 0 if of_rows(value) else None

        arguments = tuple(cut(value) for value in use.arguments)
        keywords = {name: cut(value) for name, value in use.keywords.items()}
        by_name = {name: dimension(value) for name, value in use.keywords.items()}
        dims = (tuple(dimension(value) for value in use.arguments), by_name, 0)
        gradients: Tensor = vmap(gradient_of, in_dims=dims)(arguments, keywords, cut(use.gradient))
        return gradients

    return rule


def _both(use: Use, rows: int, part: slice) -> tuple[Tensor, Tensor]:
    value, gradient = use.input.reshape(rows, -1, use.input.shape[-1])[part], _gradient(use, rows, part)
    dtype = torch.promote_types(value.dtype, gradient.dtype)
    return value.to(dtype), gradient.to(dtype)


def _gradient(use: Use, rows: int, part: slice) -> Tensor:
    assert use.gradient is not None
    gradient = use.gradient.reshape(rows, -1, use.gradient.shape[-1])[part]
    # the squares of what float16 rounds to zero are what a curvature consists of
    return gradient.float() if gradient.dtype == torch.float16 else gradient
