"""The equations of update.py as one pass over memory each, by torch.compile: C++ on CPU, Triton on CUDA.

Compiling takes seconds and calling a compiled function tens of microseconds, so this is for large tensors in
optimizers of many weights; the rest goes through the foreach operations, which give the same numbers to rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.update import LARGEST_CHANGE, Coefficients, Estimate, hess_floor, perturb_, update_

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["can_fuse", "decide", "failure", "fused_perturb_", "fused_update_"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SMALLEST_ON_CPU = 1 << 14
"""Entries of a tensor from which a call (30 us) costs less than the foreach operations it replaces (2.5 ns each)."""

SMALLEST_ELSEWHERE = 1 << 20
"""The same on an accelerator, where foreach takes many tensors in one launch."""

WORTH_ON_CPU = 4_000_000
"""Entries of an optimizer from which the seconds of compiling come back within some hundred steps."""

WORTH_ELSEWHERE = 1 << 26
"""The same on an accelerator, where a foreach step of that many takes some ten milliseconds."""


def can_fuse(*tensors: Tensor) -> bool:
    """Whether tensors of one entry each are large, dense, of a usual dtype, and so worth a compiled call."""
    first = tensors[0]
    smallest = SMALLEST_ON_CPU if first.device.type == "cpu" else SMALLEST_ELSEWHERE
    return first.numel() >= smallest and all(
        tensor.is_contiguous() and tensor.dtype in _DTYPES and tensor.device == first.device for tensor in tensors
    )


def decide(fused: bool | None, tensors: Sequence[Tensor]) -> bool:
    """Returns whether the weights of an optimizer go through compiled functions where they can.

    Args:
        fused: what was asked for; None leaves it to the number of weights and to whether compiling works.
        tensors: the weights.

    Raises:
        FinetuneError: compiling was asked for and does not work.
    """
    large = [tensor for tensor in tensors if can_fuse(tensor)]
    on_cpu = sum(tensor.numel() for tensor in large if tensor.device.type == "cpu")
    elsewhere = sum(tensor.numel() for tensor in large) - on_cpu
    worth = on_cpu >= WORTH_ON_CPU or elsewhere >= WORTH_ELSEWHERE
    if not (worth if fused is None else fused):
        return False
    reasons = [reason for reason in map(failure, sorted({tensor.device.type for tensor in large})) if reason]
    if reasons and fused:
        seen = f"IVON: fused=True, but torch.compile does not work here ({reasons[0]})"
        raise FinetuneError(f"{seen}; install a C++ compiler, or leave the choice to fused=None")
    return not reasons


@cache
def failure(device_type: str) -> str | None:
    """Returns why torch.compile does not work on a kind of device, None if it does; found out by trying."""
    coefficients = Coefficients(2.0, 0.5, 0.5, 0.5, 0.1, math.inf, 1.0, Estimate.SAMPLE)
    try:  # the failures of compilers have no common class
        results = []
        for compiled in (False, True):
            m, g, h, gradient, theta = (torch.linspace(0.5, i, 64, device=device_type) for i in range(1, 6))
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's compiler, when it is first imported, warns of its own past
                if compiled:
                    fused_perturb_(m, h, gradient, scale=0.1, weight_decay=0.0)
                    fused_update_(m, g, h, gradient, theta, coefficients=coefficients)
                else:
                    perturb_([m], [h], [gradient], scale=0.1, weight_decay=0.0)
                    update_([m], [g], [h], [gradient], [theta], coefficients=coefficients)
            results.append(torch.stack([m, g, h]))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None if torch.allclose(results[0], results[1]) else "it gives other numbers than without"


def fused_perturb_(mean: Tensor, hess: Tensor, noise: Tensor, *, scale: float, weight_decay: float) -> None:
    """Turns a mean into a sample, as `perturb_`."""
    flat = [tensor.view(-1) for tensor in (mean, hess, noise)]
    _compiled(_perturb_)(*flat, *_scalars(scale, weight_decay))


def fused_update_(
    mean: Tensor, momentum: Tensor, hess: Tensor, gradient: Tensor, estimate: Tensor, *, coefficients: Coefficients
) -> None:
    """One step of (m, g, h), as `update_`, which describes the arguments; the estimate is only read."""
    flat = [tensor.view(-1) for tensor in (mean, momentum, hess, gradient, estimate)]
    _compiled(_UPDATES[coefficients.estimate])(*flat, *_scalars_of(coefficients))


@lru_cache(maxsize=64)
def _scalars_of(coefficients: Coefficients) -> tuple[Tensor, ...]:
    c = coefficients
    rho = 1 - c.beta2
    return _scalars(
        c.weight_decay,
        rho if c.estimate is Estimate.CURVATURE else rho * c.ess,
        rho,
        hess_floor(c.weight_decay),
        c.beta1,
        1 - c.beta1,
        1 / c.bias_correction,
        c.clip_radius,
        c.step_size,
    )


@lru_cache(maxsize=64)
def _scalars(*values: float) -> tuple[Tensor, ...]:
    """Numbers as tensors: the compiler would make a new program for every value of a plain number."""
    return torch.tensor(values, dtype=torch.float32).unbind()


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _perturb_(mean: Tensor, hess: Tensor, noise: Tensor, scale: Tensor, delta: Tensor) -> None:
    mean.copy_(mean + torch.rsqrt(hess + delta) * noise * scale)


def _update_from_sample_(
    m: Tensor, g: Tensor, h: Tensor, gradient: Tensor, theta: Tensor, delta: Tensor, scale: Tensor, *rest: Tensor
) -> None:
    _step_(m, g, h, gradient, (theta.float() - m.float()) * gradient * scale, delta, *rest)


def _update_from_product_(
    m: Tensor, g: Tensor, h: Tensor, gradient: Tensor, product: Tensor, delta: Tensor, scale: Tensor, *rest: Tensor
) -> None:
    _step_(m, g, h, gradient, product * scale, delta, *rest)


def _update_from_curvature_(
    m: Tensor, g: Tensor, h: Tensor, gradient: Tensor, curvature: Tensor, delta: Tensor, scale: Tensor, *rest: Tensor
) -> None:
    _step_(m, g, h, gradient, curvature * scale / (h + delta), delta, *rest)


_UPDATES = {
    Estimate.SAMPLE: _update_from_sample_,
    Estimate.PRODUCT: _update_from_product_,
    Estimate.CURVATURE: _update_from_curvature_,
}


def _step_(  # noqa: PLR0913, PLR0917
    m: Tensor,
    g: Tensor,
    h: Tensor,
    gradient: Tensor,
    change: Tensor,
    delta: Tensor,
    rho: Tensor,
    floor: Tensor,
    beta1: Tensor,
    rest1: Tensor,
    debiasing: Tensor,
    radius: Tensor,
    step_size: Tensor,
) -> None:
    precision = h + delta
    change = (change - rho * (h / precision)).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)
    moved = precision * change
    new_h = torch.maximum(h + moved + 0.5 * (moved * change), floor)
    new_g = g * beta1 + rest1 * gradient
    direction = (new_g * debiasing + delta * m) / (new_h + delta)
    direction = torch.maximum(torch.minimum(direction, radius), -radius)
    h.copy_(new_h)
    g.copy_(new_g)
    m.copy_(m - step_size * direction)
