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
        places = _Places(chunk.seen)
        for layer in self._layers:
            for use in uses[layer.path]:
                self.totals[f"{layer.name}.places"] += len(places.of(use.input))
                for side in self._sides:
                    total = self.totals[f"{layer.name}.{side}_factor"]
                    tensor = use.input if side == "input" else use.gradient
                    if tensor is not None:
                        vectors = places.of(tensor).to(total.dtype)
                        total.addmm_(vectors.T, vectors)


class _Places:
    """The places that count in what layers see of one chunk.

    Args:
        seen: which tokens count, (rows, tokens); None for all.
    """

    def __init__(self, seen: Tensor | None) -> None:
        everything = seen is None or bool(seen.all())
        self._shapes = () if everything or seen is None else (seen.shape, (seen.numel(),))
        self._places = torch.empty(0) if seen is None else seen.reshape(-1).nonzero().squeeze(1)

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the vectors at these places, (places, features); all of them if the others are no tokens."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        if tensor.shape[:-1] not in self._shapes:
            return flat
        self._places = self._places.to(flat.device)  # once for all layers that are there
        return flat.index_select(0, self._places)
