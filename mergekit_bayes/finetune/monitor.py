"""Whether IVON's noise and curvature do what they should, measured while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.finetune.ivon import diagnose

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.finetune.ivon import IVON

__all__ = ["LITTLE_CURVATURE", "Monitor"]

LITTLE_CURVATURE = 0.1
"""Share of curvatures that have left [0.9, 1.1] h0 below which a sidecar is called nearly constant."""

_SAMPLED = 4096  # entries per parameter whose way is followed


class Monitor:
    """Follows the mean's way from where it started, on some entries of every parameter.

    Args:
        optimizer: IVON, whose parameters hold the initial mean, or will once `restart` has been called.
    """

    def __init__(self, optimizer: IVON) -> None:
        self._optimizer = optimizer
        self._parameters: Sequence[Tensor] = [
            p for group in optimizer.param_groups for p in group["params"] if p.requires_grad
        ]
        self._initial = [self._entries(p) for p in self._parameters]

    @staticmethod
    def _entries(tensor: Tensor) -> Tensor:
        stride = max(1, tensor.numel() // _SAMPLED)
        return tensor.detach().reshape(-1)[::stride].float().cpu().clone()  # also where it is on CPU already

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Returns what the log says of the posterior.

        `noise_to_weight`: root mean square of the standard deviation over that of the weights. `moved`: share of
        curvatures outside [0.9, 1.1] h0. `clipped`: share of entries at the clip radius. `noise_to_progress`: root
        mean square of the standard deviation over that of the way the mean has gone; far above 1, the samples say
        little about where training has led.
        """
        found = diagnose(self._optimizer)
        variance = square = 0.0
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter)
                if state:
                    hess = self._entries(state["hess"]).double()
                    variance += float((1 / (group["ess"] * (hess + group["solved_weight_decay"]))).sum())
        for parameter, initial in zip(self._parameters, self._initial, strict=True):
            square += float((self._entries(parameter) - initial).double().square().sum())
        return {
            "noise_to_weight": found.noise_to_weight,
            "moved": found.moved,
            "clipped": found.clipped,
            "noise_to_progress": math.sqrt(variance / square) if square else math.inf,
            "hess_init_share": found.hess_init_share,
        }
