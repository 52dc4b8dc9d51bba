"""Curvature from the state that Adam leaves behind, without any data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_bayes.errors import NonFiniteError, NumericalError

__all__ = ["adam_curvature"]


def adam_curvature(
    exp_avg_sq: Mapping[str, Tensor], *, step: int, beta2: float, batch_size: float, units: float
) -> dict[str, Tensor]:
    r"""Returns the curvature of the loss summed over N units, from Adam's average of squared batch gradients.

    Adam keeps v = (1 - beta2) sum_k beta2^(t-k) gbar_k^2 of the gradients gbar_k of mean losses over batches of B units
    (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1). With vhat = v / (1 - beta2^t),

        H = N B vhat

    as gbar is the mean of B gradients of units, whose square is 1 / B of theirs *if gradients of units are
    independent and their mean is small beside their spread*, which holds late in training. Where the mean is not
    small, H is too large, by up to B times the squared mean. It is an empirical Fisher, averaged over the last
    1 / (1 - beta2) steps rather than taken at the end; gradients that were clipped are squared as clipped, and weight
    decay that was added to gradients (Adam, not AdamW) is in it.

    Args:
        exp_avg_sq: v by the names of the parameters; not changed.
        step: t, the number of steps that were averaged, at least 1.
        beta2: of the optimizer, at least 0 and below 1.
        batch_size: B, units in a batch over which a gradient was the mean: tokens of a language model, not rows.
        units: N.

    Returns:
        H by the same names, float32, of the same shapes; 0 where Adam saw no gradient.

    Raises:
        NumericalError: a number outside its range, or a negative v.
        NonFiniteError: v is not finite.
    """
    if not (step >= 1 and 0 <= beta2 < 1 and 0 < batch_size < float("inf") and 0 < units < float("inf")):
        seen = f"step {step}, beta2 {beta2}, batch size {batch_size} and {units} units"
        raise NumericalError(f"state of Adam: {seen}; expected a step of at least 1, 0 <= beta2 < 1 and the others > 0")
    factor = units * batch_size / (1 - beta2**step)
    curvature = {}
    for name, average in exp_avg_sq.items():
        low, high = average.aminmax() if average.numel() else (torch.zeros(()), torch.zeros(()))
        if not bool(torch.isfinite(low + high)):
            raise NonFiniteError(f"state of Adam: exp_avg_sq of {name!r} is not finite; expected finite numbers")
        if low < 0:
            raise NumericalError(f"state of Adam: exp_avg_sq of {name!r} has {float(low):.6g}; expected no negative")
        curvature[name] = (average.double() * factor).float()
    return curvature
