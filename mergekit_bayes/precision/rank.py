"""Whether there was enough data to fill the factors of a Kronecker curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Shortfall", "rank_shortfalls"]


class Shortfall(NamedTuple):
    """A factor that cannot have full rank.

    Attributes:
        layer: name of the layer's weight.
        factor: `input` or `output`.
        bound: the largest rank it can have: the number of vectors whose outer products it is the sum of.
        dimension: the rank it would need; in the other directions the data says nothing, and the prior alone decides.
    """

    layer: str
    factor: str
    bound: int
    dimension: int


def rank_shortfalls(sums: Mapping[str, Tensor]) -> list[Shortfall]:
    """Finds the factors that were summed over fewer places than they have dimensions.

    Args:
        sums: of the first pass of `gram` or `kfac`, added up over processes.

    Returns:
        In the order of the sums; none of a diagonal estimate.
    """
    found = []
    for name, total in sums.items():
        layer, _, part = name.rpartition(".")
        factor = part.removesuffix("_factor")
        if factor in ("input", "output") and part != factor and f"{layer}.places" in sums:
            bound = int(sums[f"{layer}.places"])
            if bound < len(total):
                found.append(Shortfall(layer, factor, bound, len(total)))
    return found
