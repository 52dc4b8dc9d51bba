"""The equations of IVON on tensors (Shen et al., ICML 2024, arXiv 2402.17641), in place, block by block.

With mean m, momentum g, curvature h, effective sample size lambda (`ess`), weight decay delta, rho = 1 - beta2:

    theta ~ N(m, 1 / (lambda (h + delta)))
    h_hat = g_hat (theta - m) lambda (h + delta)
    g <- beta1 g + (1 - beta1) g_hat
    h <- h + (h + delta) (x + x^2 / 2),   x = rho (h_hat - h) / (h + delta)
    m <- m - lr clip((g / (1 - beta1^t) + delta m) / (h + delta), -xi, xi)

Here they are written with foreach operations, which need no compiler; fused.py has them as one pass.

theta - m is the difference that was realized, in the precision of the weights, not the one that was drawn.

The line for h is the paper's beta2 h + rho h_hat + rho^2 (h - h_hat)^2 / (2 (h + delta)), written so that
h + delta is multiplied by ((1 + x)^2 + 1) / 2 >= 1/2 and stays positive in float32 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

__all__ = ["Coefficients", "Estimate", "blocks", "differences_", "hess_floor", "perturb_", "update_"]

BLOCK_ON_CPU = 1 << 16
"""Elements per block: the blocks of one update stay in the cache, and calls cost less than what they do."""

BLOCK_ELSEWHERE = 1 << 24
"""Elements per block on an accelerator: few launches, temporaries of 64 MiB each."""

LARGEST_CHANGE = 1e15
"""Bound of |x|: without it a huge finite gradient would make x^2 infinite. No sane run comes near."""


class Estimate(Enum):
    """What the last list of an update holds."""

    SAMPLE = "theta"
    PRODUCT = "g_hat (theta - m), or its mean over samples"
    CURVATURE = "h_hat"


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one step that are the same for all entries of a parameter.

    Attributes:
        ess: effective sample size lambda.
        weight_decay: delta.
        beta1: decay of the momentum.
        beta2: decay of the curvature.
        step_size: learning rate, already times (h0 + delta) if it is rescaled.
        clip_radius: bound of each entry of the preconditioned direction.
        bias_correction: 1 - beta1^t, or 1.
        estimate: what stands for the curvature of this step.
    """

    ess: float
    weight_decay: float
    beta1: float
    beta2: float
    step_size: float
    clip_radius: float
    bias_correction: float
    estimate: Estimate = Estimate.PRODUCT

    @classmethod
    def of(cls, group: Mapping[str, Any], count: int, estimate: Estimate) -> Coefficients:
        """Returns those of the options of a group of parameters, in their step number `count`."""
        rescale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
        return cls(
            ess=group["ess"],
            weight_decay=group["weight_decay"],
            beta1=group["beta1"],
            beta2=group["beta2"],
            step_size=float(group["lr"]) * rescale,
            clip_radius=group["clip_radius"],
            bias_correction=1 - group["beta1"] ** count if group["debias"] else 1.0,
            estimate=estimate,
        )


def hess_floor(weight_decay: float) -> float:
    """Returns the lowest curvature that leaves h + delta positive in float32."""
    return -weight_decay * (1 - 1e-6) if weight_decay > 0 else 1e-30


def blocks(tensors: Sequence[Sequence[Tensor]]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cuts parallel lists of tensors into parallel lists of flat views, each list of bounded size.

    Args:
        tensors: lists of equal length; the tensors at one place have the same shape, all are on one device.

    Yields:
        One list of views per input list. On an accelerator a block holds many small tensors, on CPU a large
        tensor is many blocks: one pass over memory, the temporaries stay in the cache.
    """
    if not tensors[0]:
        return
    limit = BLOCK_ON_CPU if tensors[0][0].device.type == "cpu" else BLOCK_ELSEWHERE
    pending: list[Sequence[Tensor]] = []
    size = 0
    for row in zip(*tensors, strict=True):
        for piece in _pieces(row, limit):
            if size and size + piece[0].numel() > limit:
                yield tuple(list(views) for views in zip(*pending, strict=True))
                pending, size = [], 0
            pending.append(piece)
            size += piece[0].numel()
    if size:
        yield tuple(list(views) for views in zip(*pending, strict=True))


def _pieces(row: Sequence[Tensor], limit: int) -> Iterator[Sequence[Tensor]]:
    # views of parts would pair entries by their place in memory, not by their index, were one not contiguous
    if row[0].numel() <= limit or not all(tensor.is_contiguous() for tensor in row):
        yield row
        return
    flat = [tensor.view(-1) for tensor in row]
    for start in range(0, flat[0].numel(), limit):
        yield [tensor[start : start + limit] for tensor in flat]


def differences_(samples: Sequence[Tensor], means: Sequence[Tensor]) -> list[Tensor]:
    """Returns theta - m in float32, in place of the samples if they have that dtype."""
    if all(sample.dtype == torch.float32 for sample in samples):
        samples = list(samples)
        torch._foreach_sub_(samples, list(means))
        return samples
    # a difference of two half-precision numbers is no such number
    wide = [sample.double() if sample.dtype == torch.float64 else sample.float() for sample in samples]
    return [(sample - mean).float() for sample, mean in zip(wide, means, strict=True)]


def perturb_(
    means: list[Tensor], hess: list[Tensor], noise: list[Tensor], *, scale: float, weight_decay: float
) -> None:
    """Turns means into a sample: m + z scale / sqrt(h + delta), scale = sqrt(temperature / ess)."""
    deviation = torch._foreach_add(hess, weight_decay)
    torch._foreach_rsqrt_(deviation)
    torch._foreach_mul_(deviation, noise)
    torch._foreach_add_(means, deviation, alpha=scale)


def update_(
    means: list[Tensor],
    momenta: list[Tensor],
    hess: list[Tensor],
    gradients: list[Tensor],
    estimates: list[Tensor],
    *,
    coefficients: Coefficients,
) -> None:
    """One step of (m, g, h).

    Args:
        means: m, any floating dtype.
        momenta: g, float32.
        hess: h, float32.
        gradients: g_hat, any floating dtype.
        estimates: what the coefficients say; products and curvatures in float32, samples in the dtype of m.
            Overwritten.
        coefficients: the scalars of the step.
    """
    c = coefficients
    rho = 1 - c.beta2
    if c.estimate is Estimate.SAMPLE:
        estimates = differences_(estimates, means)
        torch._foreach_mul_(estimates, gradients)
    precision = torch._foreach_add(hess, c.weight_decay)
    change = torch._foreach_mul(estimates, rho if c.estimate is Estimate.CURVATURE else rho * c.ess)
    if c.estimate is Estimate.CURVATURE:
        torch._foreach_div_(change, precision)
    torch._foreach_add_(change, torch._foreach_div(hess, precision), alpha=-rho)
    torch._foreach_clamp_max_(change, LARGEST_CHANGE)
    torch._foreach_clamp_min_(change, -LARGEST_CHANGE)
    torch._foreach_mul_(precision, change)
    torch._foreach_add_(hess, precision)
    torch._foreach_addcmul_(hess, precision, change, 0.5)
    torch._foreach_clamp_min_(hess, hess_floor(c.weight_decay))

    torch._foreach_mul_(momenta, c.beta1)
    torch._foreach_add_(momenta, gradients, alpha=1 - c.beta1)

    precision = torch._foreach_add(hess, c.weight_decay)
    direction = torch._foreach_mul(momenta, 1 / c.bias_correction)
    if c.weight_decay:
        torch._foreach_add_(direction, means, alpha=c.weight_decay)
    torch._foreach_div_(direction, precision)
    if math.isfinite(c.clip_radius):
        torch._foreach_clamp_max_(direction, c.clip_radius)
        torch._foreach_clamp_min_(direction, -c.clip_radius)
    torch._foreach_add_(means, direction, alpha=-c.step_size)
