"""What `state_dict` holds, taken over: torch casts a state to the dtype of its parameters, this keeps float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mergekit_bayes.errors import FinetuneError

__all__ = ["check_shapes", "in_float32"]


def _pairs(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor, Mapping[str, Any]]]:
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, parameter in zip(saved, parameters, strict=False):  # torch says what is wrong with their number
        if state_dict["state"].get(index):
            yield index, parameter, state_dict["state"][index]


def check_shapes(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
    """Makes sure that a state is of such parameters.

    Args:
        state_dict: to be loaded.
        parameters: of the optimizer, in the order of its groups.

    Raises:
        FinetuneError: a shape that differs from the parameter's.
    """
    for index, parameter, entries in _pairs(state_dict, parameters):
        hess = entries.get("hess")
        if hess is not None and hess.shape != parameter.shape:
            seen = f"{tuple(hess.shape)}, the parameter {tuple(parameter.shape)}"
            raise FinetuneError(f"IVON: state of parameter {index} has the shape {seen}")


def in_float32(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Replaces momentum and curvature, as torch has loaded them, by copies from the source in float32.

    Args:
        state_dict: that was loaded.
        parameters: of the optimizer, in the order of its groups.
        states: of the optimizer, by parameter; changed.
    """
    for _, parameter, entries in _pairs(state_dict, parameters):
        for key in ("momentum", "hess"):
            tensor = cast("Tensor", entries[key])
            states[parameter][key] = tensor.detach().to(parameter.device, torch.float32, copy=True)
