"""Which mixes to look at: lattices on the simplex of weights, random and given ones, and scalings of them.

A mix is one weight per source. Lattices hold every mix whose weights are multiples of 1 / partitions and sum to one
(Das and Dennis 1998); there are C(partitions + sources - 1, sources - 1) of them. A scale beyond the simplex multiplies
all weights of a mix, so that task arithmetic at weights of one can be looked at as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mix", "in_order_of_spread", "lattice", "lattice_size", "partitions_within", "random_mixes", "scaled"]

Mix: TypeAlias = tuple[float, ...]
"""One weight per source, in the order of the recipe."""

DIGITS = 12
"""Weights that agree to so many decimals are the same."""


def lattice_size(sources: int, partitions: int) -> int:
    """Number of mixes in a lattice, without making it."""
    return math.comb(partitions + sources - 1, sources - 1)


def lattice(sources: int, partitions: int) -> tuple[Mix, ...]:
    """Every mix of multiples of 1 / partitions that sums to one.

    Args:
        sources: weights per mix, at least one.
        partitions: at least one; a step of 0.1 is 10 partitions.

    Returns:
        In descending lexicographic order: the first source alone comes first.
    """
    return tuple(tuple(count / partitions for count in counts) for counts in _compositions(partitions, sources))


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        yield from ((first, *rest) for rest in _compositions(total - first, parts - 1))


def partitions_within(sources: int, size: int) -> int:
    """The finest lattice of at most `size` mixes; at least one partition."""
    partitions = 1
    while lattice_size(sources, partitions + 1) <= size and partitions < size:
        partitions += 1
    return partitions


def random_mixes(sources: int, count: int, *, seed: int, concentration: float = 1.0) -> tuple[Mix, ...]:
    """Mixes from a symmetric Dirichlet distribution.

    Args:
        sources: weights per mix.
        count: number of mixes; a larger count continues a smaller one.
        seed: decides them.
        concentration: 1 is uniform on the simplex; less favours its corners, more its centre.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = [generator.dirichlet([concentration] * sources) for _ in range(count)]
    return tuple(tuple(float(weight) for weight in mix) for mix in drawn)


def scaled(mixes: Sequence[Mix], scales: Sequence[float]) -> tuple[Mix, ...]:
    """Every mix at every scale, without repetitions: first scale first."""
    found = {rounded(tuple(scale * weight for weight in mix)): None for scale in scales for mix in mixes}
    return tuple(found)


def rounded(mix: Mix) -> Mix:
    """A mix without the rounding of its last digits, so that equal mixes compare equal."""
    return tuple(round(weight, DIGITS) + 0.0 for weight in mix)


def in_order_of_spread(mixes: Sequence[Mix]) -> tuple[Mix, ...]:
    """The same mixes, each as far as possible from all before it, so that any first few cover the design.

    The farthest-point traversal of Gonzalez (1985), from the mix nearest to the centre of all; ties go to the mix that
    comes first. A sweep that is stopped, or whose budget ends, has then seen a coarser design and not a corner of it.
    """
    if not mixes:
        return ()
    points = np.asarray(mixes, dtype=np.float64)
    start = int(np.argmin(np.round(_distances(points, points.mean(axis=0)), DIGITS)))
    order = [start]
    nearest = _distances(points, points[start])
    for _ in range(len(mixes) - 1):
        nearest[order[-1]] = -1.0
        order.append(int(np.argmax(np.round(nearest, DIGITS))))
        nearest = np.minimum(nearest, _distances(points, points[order[-1]]))
    return tuple(mixes[index] for index in order)


def _distances(points: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.square(points - point).sum(axis=1)
    return squares
