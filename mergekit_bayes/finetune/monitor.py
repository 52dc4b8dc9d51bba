"""Whether IVON's noise and curvature do what they should, measured while it trains on a sample of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.finetune.ivon.sharding import is_sharded, local, local_range

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.finetune.ivon import IVON

__all__ = ["LITTLE_CURVATURE", "MUCH_FLOORED", "Monitor", "curvature_warning"]

LITTLE_CURVATURE = 0.1
"""Share of curvatures that have left [0.9, 1.1] h0 below which a sidecar is called nearly constant."""

MUCH_FLOORED = 0.5
"""Share of curvatures that are not positive without h0 above which a sidecar is called nearly noise."""

_SAMPLED = 4096
"""Entries per parameter that are looked at: enough for shares, and one step in a thousand of a large model's memory."""


class Monitor:
    """Follows the posterior and the way the mean has gone, on some entries of every parameter.

    Where parameters are spread over processes, each looks at its part of the same entries, and all call `measure`.

    Args:
        optimizer: IVON with one group, whose parameters hold the initial mean.
    """

    def __init__(self, optimizer: IVON) -> None:
        self._optimizer = optimizer
        (group,) = optimizer.param_groups
        self._group = group
        self._parameters: Sequence[Tensor] = [p for p in group["params"] if p.requires_grad]
        self._initial = _sample(self._parameters)
        self._weights = _weights(self._parameters)
        self._sharded = [p for p in self._parameters if is_sharded(p)]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Returns what the log says of the posterior.

        `noise_to_weight`: root mean square of the standard deviation over that of the weights. `moved`: share of
        curvatures outside [0.9, 1.1] h0. `clipped`: share of entries at the clip radius. `noise_to_progress`: root
        mean square of the standard deviation over that of the way the mean has gone; far above 1, the samples say
        little about where training has led. `hess_init_share`: weight that h0 still has in h.
        """
        group, states = self._group, [self._optimizer.state[p] for p in self._parameters]
        hess, momentum = _sample([s["hess"] for s in states]), _sample([s["momentum"] for s in states])
        mean, decay = _sample(self._parameters), group["weight_decay"]
        precision = hess + group["solved_weight_decay"]
        ratio = hess / group["hess_init"]
        correction = 1 - group["beta1"] ** max(1, *(s["step"] for s in states)) if group["debias"] else 1.0
        direction = (momentum / correction + decay * mean) / precision
        noise, square, way, moved, clipped = self._means(
            1 / (group["ess"] * precision),
            mean.square(),
            (mean - self._initial).square(),
            (ratio < 0.9) | (ratio > 1.1),
            direction.abs() >= group["clip_radius"],
        )
        return {
            "noise_to_weight": _root(noise, square),
            "moved": moved,
            "clipped": clipped,
            "noise_to_progress": _root(noise, way),
            "hess_init_share": max(s["hess_init_share"] for s in states),
        }

    def _means(self, *columns: Tensor) -> list[float]:
        sums = torch.stack([(values * self._weights).sum() for values in (*columns, torch.ones(()))])
        if self._sharded:
            sums = sums.to(local(self._sharded[0]).device)
            torch.distributed.all_reduce(sums)
        means: list[float] = (sums[:-1] / sums[-1]).tolist()
        return means


def curvature_warning(*, moved: float, floored: float) -> str | None:
    """Returns what to say of a sidecar that carries almost no curvature, and the remedy; None if it carries some.

    Args:
        moved: share of curvatures outside [0.9, 1.1] h0.
        floored: share that had to be raised to the floor when what is left of h0 was taken out.
    """
    if moved < LITTLE_CURVATURE:
        seen = f"{moved:.1%} of it has moved more than 10% from hess_init"
    elif floored > MUCH_FLOORED:
        seen = f"{floored:.1%} of it is not positive once what is left of hess_init is taken out"
    else:
        return None
    return (
        f"The precision carries almost no curvature: {seen}. Estimate it with a `precision` pass over the finished "
        "model, or train with a smaller optimizer.ess or a smaller optimizer.beta2 (a larger 1 - beta2)."
    )


def _stride(tensor: Tensor) -> int:
    return max(1, tensor.numel() // _SAMPLED)


def _sample(tensors: Sequence[Tensor]) -> Tensor:
    """Some entries of every tensor, in float64 on the CPU; one transfer for all."""
    entries = [local(tensor.detach()).reshape(-1)[_first(tensor) :: _stride(tensor)].float() for tensor in tensors]
    return torch.cat(entries).cpu().double()


def _weights(tensors: Sequence[Tensor]) -> Tensor:
    """How many entries each of those in the sample stands for."""
    columns = []
    for tensor in tensors:
        share = tensor.numel() / max(1, math.ceil(tensor.numel() / _stride(tensor)))
        taken = max(0, math.ceil((local(tensor).numel() - _first(tensor)) / _stride(tensor)))
        columns.append(torch.full((taken,), share, dtype=torch.float64))
    return torch.cat(columns)


def _first(tensor: Tensor) -> int:
    """The first entry of this process's part that is in the sample of the whole."""
    begin, _ = local_range(tensor) or (0, 0)
    return -begin % _stride(tensor)


def _root(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / denominator) if denominator else math.inf
