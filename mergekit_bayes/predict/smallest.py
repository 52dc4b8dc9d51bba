"""The k smallest of very many non-negative numbers that are never in memory together.

The bits of a non-negative float32 are ordered as the number is. Counting by the upper 16 bits finds the bin in which
the k-th smallest lies, counting by the lower 16 bits within that bin the number itself: two passes, exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["smallest_masks"]

_BINS = 1 << 16


def smallest_masks(scores: Callable[[], Iterable[Tensor]], count: int) -> Iterator[Tensor]:
    """Yields a mask per tensor that marks the `count` smallest entries of all tensors together.

    Args:
        scores: gives the tensors, non-negative float32, in the same order each time it is called.
        count: how many to mark; of equal entries those that come first.
    """
    if count < 1:
        yield from (torch.zeros_like(score, dtype=torch.bool) for score in scores())
        return
    upper, below = _bin_of(_counted(_bits(score) >> 16 for score in scores()), count)
    lower, within = _bin_of(
        _counted((bits & (_BINS - 1))[bits >> 16 == upper] for bits in map(_bits, scores())), count - below
    )
    threshold, ties = upper << 16 | lower, count - below - within
    for score in scores():
        bits = _bits(score)
        mask, equal = bits < threshold, (bits == threshold).nonzero()[:, 0]
        mask[equal[:ties]] = True
        ties -= min(ties, len(equal))
        yield mask.view(score.shape)


def _bits(score: Tensor) -> Tensor:
    # + 0.0 turns a negative zero, whose bits are those of a negative number, into zero
    return (score.reshape(-1) + 0.0).view(torch.int32)


def _counted(parts: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(_BINS, dtype=torch.int64)
    for part in parts:
        total += torch.bincount(part, minlength=_BINS).cpu()
    return total


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the number of this rank (from 1), and how many lie in lower bins."""
    cumulated = counts.cumsum(0)
    place = int(torch.searchsorted(cumulated, rank))
    return place, int(cumulated[place] - counts[place])
