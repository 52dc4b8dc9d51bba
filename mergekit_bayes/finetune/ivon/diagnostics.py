"""Whether the curvature carries information yet, and starting values with which it can."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.sharding import whole

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.finetune.ivon.optimizer import IVON

__all__ = ["Diagnostics", "StartingValues", "diagnose", "starting_values"]


@dataclass(frozen=True)
class Diagnostics:
    """Where an optimizer stands, over all parameters that have state.

    Attributes:
        moved: share of curvatures outside [0.9, 1.1] h0; near 0 the precision is a constant.
        clipped: share of entries whose direction is at the clip radius; near 1 the step is a sign step.
        noise_to_weight: root mean square of the standard deviation over that of the mean.
        lowest_precision: smallest h + weight_decay; always positive.
        hess_init_share: weight that h0 still has in h, beta2^T.
        skipped: steps skipped because of a gradient that was not finite.
    """

    moved: float
    clipped: float
    noise_to_weight: float
    lowest_precision: float
    hess_init_share: float
    skipped: int


@torch.no_grad()
def diagnose(optimizer: IVON) -> Diagnostics:
    """Measures mean and curvature as they are now; costs about one step.

    With sharded parameters every process calls it: one parameter at a time is gathered.

    Raises:
        FinetuneError: no parameter has state yet.
    """
    entries = moved = clipped = 0
    variance = square = 0.0
    lowest, share = math.inf, 0.0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            hess, momentum, mean = whole(state["hess"]), whole(state["momentum"]), whole(parameter).float()
            precision = hess + group["solved_weight_decay"]
            ratio = hess / group["hess_init"]
            correction = 1 - group["beta1"] ** max(state["step"], 1) if group["debias"] else 1.0
            direction = (momentum / correction + group["weight_decay"] * mean) / precision
            entries += hess.numel()
            moved += int(((ratio < 0.9) | (ratio > 1.1)).sum())
            clipped += int((direction.abs() >= group["clip_radius"]).sum())
            variance += float((1 / (group["ess"] * precision)).double().sum())
            square += float(mean.double().square().sum())
            lowest = min(lowest, float(precision.min())) if hess.numel() else lowest
            share = max(share, state["hess_init_share"])
    if not entries:
        raise FinetuneError("IVON diagnostics: no parameter has been sampled yet")
    return Diagnostics(
        moved=moved / entries,
        clipped=clipped / entries,
        noise_to_weight=math.sqrt(variance / square) if square else math.inf,
        lowest_precision=lowest,
        hess_init_share=share,
        skipped=optimizer.param_groups[0]["skipped"],
    )


@dataclass(frozen=True)
class StartingValues:
    """Options of IVON for a run of known length.

    Attributes:
        ess: effective sample size.
        hess_init: initial curvature.
        beta2: decay of the curvature.
        noise_to_weight: of the first step, with these.
    """

    ess: float
    hess_init: float
    beta2: float
    noise_to_weight: float


def starting_values(
    parameters: Iterable[Tensor],
    *,
    units_seen: int,
    steps: int,
    noise_to_weight: float = 0.1,
    weight_decay: float = 0.0,
    remaining_share: float = 0.05,
) -> StartingValues:
    """Derives ess, hess_init and beta2 from how noisy the weights may be and how long the run is.

    ess is the number of training units the run sees: the estimate of h settles at H + (1 - beta2) ess E[g^2] / 2, and
    the second term swamps the first beyond about that many. h0 solves
    1 / (ess (h0 + weight_decay)) = (noise_to_weight rms)^2, with rms over the tensors that are not zero (the second
    factor of an adapter starts at zero and says nothing about scale). beta2 leaves h0 the given share of h.

    Args:
        parameters: trainable ones, at their initial values.
        units_seen: training units of the run, repetitions counted.
        steps: optimizer steps of the run.
        noise_to_weight: target ratio of the standard deviation to the weights.
        weight_decay: of the optimizer.
        remaining_share: beta2^steps.

    Raises:
        FinetuneError: nothing to derive from, or a ratio that this weight_decay does not allow.
    """
    square, count = 0.0, 0
    for parameter in parameters:
        if parameter.requires_grad and bool((values := whole(parameter)).any()):
            square += float(values.double().square().sum())
            count += values.numel()
    if not count or units_seen < 1 or steps < 1:
        raise FinetuneError("IVON starting values: expected a trainable parameter other than zero; units, steps >= 1")
    if not (0 < noise_to_weight < math.inf and 0 < remaining_share < 1):
        raise FinetuneError("IVON starting values: expected noise_to_weight > 0 and remaining_share in (0, 1)")
    rms = math.sqrt(square / count)
    ess = float(units_seen)
    hess_init = 1 / (ess * (noise_to_weight * rms) ** 2) - weight_decay
    if hess_init <= 0:
        most = 1 / (rms * math.sqrt(ess * weight_decay))
        seen = f"IVON starting values: noise_to_weight is {noise_to_weight}; weight_decay {weight_decay} allows less"
        raise FinetuneError(f"{seen} {most:.3g}")
    return StartingValues(ess, hess_init, remaining_share ** (1 / steps), noise_to_weight)
