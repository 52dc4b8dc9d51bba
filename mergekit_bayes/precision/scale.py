"""Multiplying a curvature by a number, whatever tensors describe it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["scaled"]


def scaled(curvature: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Returns a curvature times a number, such as N over the units an estimate was summed over.

    A Kronecker term is multiplied once: in its eigenvalues where it has them, else in its output factor, else in its
    input factor.

    Args:
        curvature: by the names of `Estimator.result`; not changed.
        factor: any number >= 0.
    """
    return {name: tensor * factor if _carries_scale(name, curvature) else tensor for name, tensor in curvature.items()}


def _carries_scale(name: str, curvature: Mapping[str, Tensor]) -> bool:
    layer, _, part = name.rpartition(".")
    if part == "output_factor":
        return f"{layer}.eigenvalues" not in curvature
    if part == "input_factor":
        return f"{layer}.eigenvalues" not in curvature and f"{layer}.output_factor" not in curvature
    return True
