"""Second moments of what goes into linear layers and of the gradients of what comes out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mergekit_bayes.precision.chunks import Chunk
from mergekit_bayes.precision.observe import Use
from mergekit_bayes.precision.registry import Side
from mergekit_bayes.precision.squares import sum_dtype
from mergekit_bayes.precision.targets import Layer

__all__ = ["Moments", "layer_zeros"]


def layer_zeros(model: nn.Module, layer: Layer, *shape: int) -> Tensor:
    """Returns a sum for a layer, on its device."""
    like = next(model.get_submodule(layer.path).parameters())
    return torch.zeros(shape, dtype=sum_dtype(like.dtype), device=like.device)


class Moments:
    """Sums over places of x x^T and d d^T, for inputs x and output gradients d of linear layers.

    Places are all tokens of a row that some loss depends on (`Chunk.seen`); of a layer whose inputs are no tokens, all
    its inputs.

    Args:
        model: with the layers in it.
        layers: linear layers.
        sides: `input` for x, `output` for d.

    Attributes:
        totals: by the name of the layer's weight with `.input_factor`, (in_features, in_features), `.output_factor`,
            (out_features, out_features), or `.places` appended, the number of places, 0-dim float64.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer], *, sides: Iterable[Side]) -> None:
        self._sides = tuple(sides)
        self._layers = tuple(layers)
        self.totals: dict[str, Tensor] = {}
        for layer in self._layers:
            lengths = {"input": layer.in_features, "output": layer.out_features}
            for side in self._sides:
                self.totals[f"{layer.name}.{side}_factor"] = layer_zeros(model, layer, lengths[side], lengths[side])
            self.totals[f"{layer.name}.places"] = torch.zeros((), dtype=torch.float64)

    def add(self, uses: dict[str, list[Use]], chunk: Chunk) -> None:
        """Adds what the layers saw of a chunk."""
        seen = chunk.seen
        for layer in self._layers:
            for use in uses[layer.path]:
                kept = places(use.input, seen)
                self.totals[f"{layer.name}.places"] += len(kept)
                for side in self._sides:
                    total = self.totals[f"{layer.name}.{side}_factor"]
                    tensor = use.input if side == "input" else use.gradient
                    if tensor is not None:
                        vectors = places(tensor, seen).to(total.dtype)
                        total.addmm_(vectors.T, vectors)


def places(tensor: Tensor, seen: Tensor | None) -> Tensor:
    """Returns the vectors at the places that count, (places, features).

    Args:
        tensor: (..., features) of a layer.
        seen: which tokens count, (rows, tokens); used if the other dimensions of the tensor are these, or these in one.
    """
    flat = tensor.reshape(-1, tensor.shape[-1])
    if seen is None or tensor.shape[:-1] not in (seen.shape, (seen.numel(),)):
        return flat
    return flat[seen.reshape(-1).to(flat.device)]
