"""What a precision is estimated of: parameters by name, and linear layers by the weight they stand for.

    space      one entry of the result describes
    factor     a trained parameter of an adapter, such as a LoRA factor
    product    the update dW of the weight below an adapted layer, by the name of the base's weight
    full       a trained parameter of a model

An adapted layer computes (W + dW) x whatever dW is made of, so its input and the gradient of its output are
those of dW: statistics in product space need no other passes than those of the factors, and W itself may be
quantised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from mergekit_bayes.errors import ModelError

__all__ = ["Layer", "Target", "Targets", "Weight", "count", "factored_only", "find_targets"]

Space = Literal["factor", "product", "full"]
Side = Literal["input", "output"]

_PREFIX = "base_model.model."
_SAVED = ".modules_to_save."
_FACTORS = ("lora_A", "lora_embedding_A")


@dataclass(frozen=True)
class Weight:
    """A parameter with a diagonal precision.

    Attributes:
        name: key in the result.
        path: name of the parameter in memory.
        shape: of the parameter, and of its precision.
    """

    name: str
    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A linear layer, or an embedding, known by the weight it multiplies by.

    Attributes:
        name: key in the result: the name of the weight it stands for.
        path: name of the module in memory, whose inputs and output gradients are looked at.
        out_features: rows of the weight; of an embedding, the size of its vocabulary.
        in_features: columns of the weight; of an embedding, the length of its vectors.
        embedding: whether it looks up rows instead of multiplying.
        factored: whether it is described by Kronecker factors; if not, by a diagonal of the weight's shape.
    """

    name: str
    path: str
    out_features: int
    in_features: int
    embedding: bool = False
    factored: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (out_features, in_features), however the model stores it."""
        return self.out_features, self.in_features


Target = Weight | Layer


@dataclass(frozen=True)
class Targets:
    """What one estimator looks at.

    Attributes:
        space: what the results describe.
        weights: parameters with a diagonal precision.
        layers: layers whose weight, or in product space whose weight's update, is described.
    """

    space: Space
    weights: tuple[Weight, ...] = ()
    layers: tuple[Layer, ...] = ()

    def groups(self, max_bytes: int, size: Callable[[Target], int]) -> Iterator[Targets]:
        """Cuts the targets into parts that can be estimated one after the other, each in a pass of its own.

        Args:
            max_bytes: most that one part may take; a single target that takes more is a part of its own.
            size: bytes that an estimator keeps for a target, such as `Estimator.size`.

        Returns:
            At least one part; the order is kept.
        """
        weights: list[Weight] = []
        layers: list[Layer] = []
        held = 0
        everything: list[Target] = [*self.layers, *self.weights]
        for target in everything:
            needed = size(target)
            if held + needed > max_bytes and (weights or layers):
                yield Targets(self.space, tuple(weights), tuple(layers))
                weights, layers, held = [], [], 0
            if isinstance(target, Weight):
                weights.append(target)
            else:
                layers.append(target)
            held += needed
        yield Targets(self.space, tuple(weights), tuple(layers))


def find_targets(
    model: nn.Module,
    *,
    space: Space,
    factors: Collection[Side] = (),
    max_dimension: int | None = None,
    names: Collection[str] | None = None,
) -> Targets:
    """Finds what an estimator should look at.

    With Kronecker factors a linear layer is described by them if its weight is used nowhere else (a head that shares
    its weight with the embedding is not one linear layer's) and no factor would be longer than `max_dimension`; all
    other trained parameters get a diagonal. In product space whatever an adapter stores whole is described by a
    diagonal under the name of the weight it replaces.

    Args:
        model: any module; with an adapter for the spaces `factor` and `product`.
        space: `factor`, `product` or `full`.
        factors: the Kronecker factors that an estimator computes (`EstimatorSpec.factors`); none for a diagonal.
        max_dimension: longest side of a factor; None for no limit.
        names: parameters in memory to describe (by their first name, where one is shared); None for all that require
            gradients.

    Raises:
        ModelError: there is nothing of that kind in the model, or the estimator does not describe that space.
    """
    wanted = [
        Weight(name, name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if (parameter.requires_grad if names is None else name in names)
    ]
    if factors and space == "factor":
        raise ModelError("Kronecker factors describe weights or updates of weights; expected space product or full")
    limit = float("inf") if max_dimension is None else max_dimension

    def factored(layer: Layer) -> bool:
        sides = {"input": layer.in_features, "output": layer.out_features}
        return bool(factors) and not layer.embedding and all(sides[side] <= limit for side in factors)

    if space == "product":
        targets = _product_targets(model, wanted, factored)
    else:
        targets = _parameter_targets(model, space, wanted, factored)
    if not targets.weights and not targets.layers:
        kind = "an adapted layer" if space == "product" else "a parameter that requires gradients"
        raise ModelError(f"{type(model).__name__}: has nothing to estimate precisions of; expected {kind}")
    if factors and not any(layer.factored for layer in targets.layers):
        within = "" if max_dimension is None else f" whose factors have no side longer than {max_dimension}"
        raise ModelError(f"{type(model).__name__}: has no linear layer to describe; expected one{within}")
    return targets


def count(target: Target) -> int:
    """Returns the number of entries of a weight."""
    return math.prod(target.shape)


def factored_only(targets: Targets) -> Targets:
    """Returns the targets without those that Kronecker factors do not describe."""
    return Targets(targets.space, (), tuple(layer for layer in targets.layers if layer.factored))


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as (in_features, out_features), as Conv1D of transformers does."""
    return type(module).__name__ == "Conv1D"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def _product_targets(model: nn.Module, wanted: list[Weight], factored: Callable[[Layer], bool]) -> Targets:
    layers = []
    for path, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module) and any(len(getattr(module, side, ())) for side in _FACTORS):
            layer = _layer(f"{path.removeprefix(_PREFIX)}.weight", path, base)
            layers.append(replace(layer, factored=factored(layer)))
    inside = tuple(f"{layer.path}." for layer in layers)
    whole = [
        Weight(_base_name(weight.path), weight.path, weight.shape)
        for weight in wanted
        if not weight.path.startswith(inside)
    ]
    return Targets("product", tuple(whole) if layers else (), tuple(layers))


def _base_name(path: str) -> str:
    """The base's name of a parameter that an adapter stores whole."""
    before, held, after = path.removeprefix(_PREFIX).partition(_SAVED)
    return f"{before}.{after.partition('.')[2]}" if held else before


def _layer(name: str, path: str, module: nn.Module) -> Layer:
    if isinstance(module, nn.Embedding):
        return Layer(name, path, module.num_embeddings, module.embedding_dim, embedding=True)
    if is_transposed(module):
        weight = module.get_parameter("weight")
        return Layer(name, path, weight.shape[1], weight.shape[0])
    if isinstance(module, nn.Linear):  # a quantised one packs its weight, whose shape then says nothing
        return Layer(name, path, module.out_features, module.in_features)
    raise ModelError(f"{path}: adapts a {type(module).__name__}; expected a linear layer or an embedding")


def _parameter_targets(
    model: nn.Module, space: Space, wanted: list[Weight], factored: Callable[[Layer], bool]
) -> Targets:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    uses = Counter(first[id(each)] for module in model.modules() for each in module.parameters(recurse=False))
    found = {}
    for path, module in model.named_modules():
        if _is_linear(module):
            name = first[id(module.get_parameter("weight"))]
            layer = _layer(name, path, module)
            if uses[name] == 1 and factored(layer):
                found[name] = replace(layer, factored=True)
    layers = tuple(found[weight.name] for weight in wanted if weight.name in found)
    return Targets(space, tuple(weight for weight in wanted if weight.name not in found), layers)
