"""Batches as data loaders make them, and what a model says about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError

__all__ = ["Batch", "Forward", "evaluating", "labels_of", "logits_of", "to_device"]

Batch = Mapping[str, Any] | Sequence[Tensor] | Tensor
"""Keyword arguments of the model with `labels` among them, a pair (inputs, labels), or inputs alone"""

Forward = Callable[[nn.Module, Any], Tensor]
"""(model, batch without labels, on the model's device) to logits"""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are off, and gradients are not recorded, inside; the modes of all modules return after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def labels_of(batch: Batch) -> tuple[Batch, Tensor | None]:
    """Returns a batch without its labels, and the labels if it has any.

    A model that is given labels computes a loss nobody asked for.
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, batch.get("labels")
    if isinstance(batch, Tensor):
        return batch, None
    if len(batch) != 2:
        raise EvaluateError(f"a batch is a sequence of {len(batch)}; expected a pair (inputs, labels) or a mapping")
    return batch[0], batch[1]


def to_device(batch: Any, model: nn.Module) -> Any:
    """Returns a batch with its tensors on the device of the model's first parameter that has one.

    Weights that Accelerate offloads have none; it moves inputs to where a layer computes.
    """
    places = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = next(places, torch.device("cpu"))
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Calls the model as transformers models and plain modules are called.

    Raises:
        EvaluateError: its output has no logits.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        seen = f"{type(model).__name__} returns a {type(output).__name__} without logits"
        raise EvaluateError(f"{seen}; expected a model with a head, or a `forward` that computes logits")
    return logits
