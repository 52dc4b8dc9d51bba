"""Sums of squared gradients of rows, for everything that is described by a diagonal."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergekit_bayes.precision.chunks import Chunk
from mergekit_bayes.precision.coverage import unseen_parameters
from mergekit_bayes.precision.gradients import Lookup, Rule, add_lookup_squares, add_squares, rule_of, weight_rule
from mergekit_bayes.precision.observe import Observation
from mergekit_bayes.precision.targets import Layer, Targets

__all__ = ["Squares", "sum_dtype"]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns what sums of numbers of a dtype are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Squares:
    """For every target without factors, the sum over rows of the squared gradient of the row's summed signal.

    Args:
        model: with the targets in it.
        targets: weights, and those layers that no Kronecker factors describe.

    Attributes:
        totals: by the name of the target; float32 (float64 for models in float64), on the device of the weight.
        direct: parameters that hooks do not see all of, by the name of the target; with any, rows come one by one.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        parameters = dict(model.named_parameters())
        self._model = model
        self._parameters = {weight.name: parameters[weight.path] for weight in targets.weights}
        self.totals = {name: _zeros(parameter, parameter.shape) for name, parameter in self._parameters.items()}
        self._rules = _rules(model, self._parameters)
        for layer in targets.layers:
            if not layer.factored:
                within = next(model.get_submodule(layer.path).parameters())
                self.totals[layer.name] = _zeros(within, layer.shape)
                self._rules[layer.name] = [(layer.path, _update_rule(layer))]
        self.direct: dict[str, nn.Parameter] = {}
        self._checked = False

    @property
    def watched(self) -> list[str]:
        """Paths of the modules whose inputs and output gradients are needed, each once."""
        return list(dict.fromkeys(path for name in self._by_hooks() for path, _ in self._rules[name]))

    def check(self, chunk: Chunk) -> None:
        """Finds out from one row, the first time, which parameters have to be differentiated themselves."""
        if self._checked or not self._parameters:
            return
        row = next(chunk.single_rows())
        unseen = set(unseen_parameters(self._model, row.inputs, self._parameters))
        self.direct = {name: each for name, each in self._parameters.items() if name in unseen}
        self._checked = True

    def add(self, seen: Observation, rows: int) -> None:
        """Adds what was seen of a chunk of so many rows, which can be told apart."""
        for name, gradient in seen.direct.items():
            total = self.totals[name]
            total.addcmul_(gradient.to(total.dtype), gradient.to(total.dtype))
        for name in self._by_hooks():
            uses = [(rule, use) for path, rule in self._rules[name] for use in seen.uses[path]]
            if len(uses) == 1 and isinstance(uses[0][0], Lookup):
                add_lookup_squares(self.totals[name], uses[0][0], uses[0][1], rows)
            else:
                add_squares(self.totals[name], uses, rows)

    def _by_hooks(self) -> list[str]:
        return [name for name in self._rules if name not in self.direct]


def _rules(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[tuple[str, Rule]]]:
    """The modules without children that own a parameter, by its name, and how its gradient follows from each."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    rules: dict[str, list[tuple[str, Rule]]] = {name: [] for name in parameters}
    for path, module in model.named_modules():
        if not any(True for _ in module.children()):
            for attribute, parameter in module.named_parameters(recurse=False):
                if id(parameter) in names:
                    rules[names[id(parameter)]].append((path, rule_of(module, attribute)))
    return rules


def _update_rule(layer: Layer) -> Rule:
    return Lookup(layer.out_features) if layer.embedding else weight_rule()


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=sum_dtype(like.dtype), device=like.device)
