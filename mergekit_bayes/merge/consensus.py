r"""Trimming task vectors and electing signs: the two steps of TIES that other methods borrow.

    trim    keep the share of entries with the largest magnitude, zero the rest
    elect   of each entry, the sign that has the larger sum, and who agrees with it

(Yadav et al., "TIES-Merging", arXiv 2306.01708.) Pure functions of tensors of any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALL_NORM = 1e-7
"""Sums of magnitudes below this are not rescaled by, as in mergekit."""


def trim(task_vector: Tensor, density: float, *, rescale: bool = False) -> Tensor:
    """Keep the entries of largest magnitude and set the others to zero.

    Exactly max(1, floor(density * entries)) entries are kept; among equal magnitudes the first ones. (mergekit leaves
    to its sort which of them; nothing else differs.)

    Args:
        task_vector: any shape.
        density: share of entries to keep, 0 to 1; 0 keeps none.
        rescale: multiply what is kept so that the sum of magnitudes stays as it was.

    Returns:
        A tensor of the same shape; the input itself at density 1.
    """
    entries = task_vector.numel()
    if density >= 1 or entries == 0:
        return task_vector
    if density <= 0:
        return torch.zeros_like(task_vector)
    magnitudes = task_vector.abs().flatten()
    keep = _largest(magnitudes, max(1, int(density * entries))).view(task_vector.shape)
    kept = torch.where(keep, task_vector, torch.zeros((), dtype=task_vector.dtype, device=task_vector.device))
    return _rescaled(kept, magnitudes) if rescale else kept


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Which entries are among the `count` largest; of those equal to the smallest of them, the first."""
    if count >= magnitudes.numel():
        return torch.ones_like(magnitudes, dtype=torch.bool)
    threshold = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    keep = magnitudes > threshold
    at_threshold = (magnitudes == threshold).nonzero().squeeze(1)
    keep[at_threshold[: count - int(keep.sum())]] = True
    return keep


def _rescaled(kept: Tensor, magnitudes: Tensor) -> Tensor:
    before, after = float(magnitudes.sum(dtype=torch.float64)), float(kept.abs().sum(dtype=torch.float64))
    return kept if min(before, after) < SMALL_NORM else kept * (before / after)


def elect(votes: Tensor, *, undecided: float) -> Tensor:
    """Which votes agree with the sign of their sum.

    Args:
        votes: task vectors that have been multiplied by their weights, shape (sources, *weight).
        undecided: the sign that wins where the sum is exactly zero: 1, -1, or 0 for none.

    Returns:
        True where an entry is not zero and has the elected sign, shape (sources, *weight).
    """
    total = votes.sum(dim=0)
    elected = torch.where(total == 0, torch.full_like(total, undecided), total.sign())
    return (votes.sign() == elected).logical_and_(votes != 0)
