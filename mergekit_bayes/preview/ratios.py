r"""Ten thousand mixes under the rule in seconds: entries gathered by the ratios of their precisions.

Under the rule a merged mean is theta_0 plus the moves d_s of the sources, each times a factor y_s that depends on the
mix and on the ratios of the entry's precisions alone,

    y_s = alpha_s S_s / sum_u alpha_u S_u                             where nothing is left for the prior
    y_s = alpha_s (1 + H_s / S_0) / (1 + sum_u alpha_u H_u / S_0)     else, H_s = S_s - S_0

so that the increase of task t is a quadratic form in y with the matrix H_t d d^T. As functions of the logarithms of the
ratios these factors are smooth for every mix alike: their nearest poles are pi away from the real axis. They are
therefore interpolated between the nodes of a grid, by cubics of Lagrange, which turns sums over entries into sums over
nodes: the matrices of an entry are dealt to the nodes around it with the weights of the interpolation. What is left of
a model of any size is a few thousand small matrices. The error, some 1e-4 of the increase at the base, is measured for
every sweep at mixes that are summed entry by entry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_bayes.preview.surrogate import Block

__all__ = ["MOST_RATIOS", "SharedRatios"]

MOST_RATIOS = 3
"""Ratios per entry, at most: with each of them the nodes around an entry become four times as many."""

SPACING = {False: 0.4, True: 0.5}
"""Between nodes, in the logarithm of a ratio; with a prior there is a ratio more, and its nodes are many."""

_SMALLEST, _LARGEST = -14.0, 40.0  # logarithms of ratios that are told from zero and from infinity
_ENTRIES = 1 << 19  # gathered at a time
_MIXES, _NODES = 128, 1024
_SIDE = 1 << 12  # places along an axis of the grid, more than the logarithms need


class SharedRatios:
    """The increases of mixes under the rule, for weights that are not negative and no floor.

    Args:
        sources: number of sources.
        prior: whether some mix leaves a share for the prior; S_0 must then be positive.
        spacing: between nodes; None for `SPACING`.
    """

    def __init__(self, sources: int, *, prior: bool, spacing: float | None = None) -> None:
        self._sources, self._prior = sources, prior
        self._spacing = SPACING[prior] if spacing is None else spacing
        self._ratios = sources if prior else sources - 1
        if self._ratios > MOST_RATIOS:
            raise ValueError(f"{self._ratios} ratios per entry; at most {MOST_RATIOS}")
        self._pairs = list(itertools.combinations_with_replacement(range(sources), 2))
        corners = list(itertools.product(range(-1, 3), repeat=self._ratios))
        self._corners = torch.tensor(corners, dtype=torch.long).view(len(corners), self._ratios)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._nodes: list[tuple[Tensor, Tensor]] = []
        self._constant = torch.zeros(sources, dtype=torch.float64)

    def add(self, block: Block, precisions: Tensor) -> None:
        """Take in some entries.

        Args:
            block: moves and curvatures.
            precisions: S_s as the method has them, and S_0 as the last row, shape (sources + 1, entries).
        """
        moves, curvature = block
        self._constant += (curvature * moves.square()).sum(dim=1) / 2
        products = torch.stack([moves[s] * moves[u] for s, u in self._pairs], dim=1)
        matrices = (curvature.T[:, :, None] * products[:, None, :]).flatten(1).float()
        self._waiting.append((self._logarithms(precisions), matrices))
        if sum(len(matrices) for _, matrices in self._waiting) >= _ENTRIES:
            self._flush()

    def _logarithms(self, precisions: Tensor) -> Tensor:
        """Coordinates of the entries on the grid, shape (entries, ratios)."""
        if self._prior:
            ratios = (precisions[:-1] / precisions[-1] - 1).clamp(min=0)
        else:
            known = precisions[:-1].maximum(precisions[:-1].amax(dim=0) * math.exp(_SMALLEST))
            ratios = known[1:] / known[0]
        return (ratios.nan_to_num(1.0).log().clamp(_SMALLEST, _LARGEST) / self._spacing).T

    def _flush(self) -> None:
        """Deal what is waiting to the nodes around it."""
        if not self._waiting:
            return
        at, matrices = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        below = at.floor()
        keys, order = _key(below.long()).sort()
        cells, counts = torch.unique_consecutive(keys, return_counts=True)
        weights = _cubic((at - below)[order].float())
        sizes = counts.tolist()
        parts = zip(torch.split(weights, sizes), torch.split(matrices[order], sizes), strict=True)
        dealt = [own.T @ values for own, values in parts]
        places = cells[:, None] + (_key(self._corners) - _key(torch.zeros_like(self._corners[:1])))
        self._nodes.append((places.flatten(), torch.cat(dealt).double()))
        self._gather()

    def _gather(self) -> None:
        """Add up what several flushes have for one node."""
        places, owner = torch.unique(torch.cat([at for at, _ in self._nodes]), return_inverse=True)
        values = torch.cat([values for _, values in self._nodes])
        self._nodes = [(places, values.new_zeros(len(places), values.shape[1]).index_add_(0, owner, values))]

    @property
    def nodes(self) -> int:
        """Number of nodes with something in them."""
        self._flush()
        return sum(len(places) for places, _ in self._nodes)

    def increases(self, weights: Tensor) -> Tensor:
        """Increase of every task.

        Args:
            weights: alpha, shape (mixes, sources), not negative and not all zero, float64.

        Returns:
            Shape (mixes, tasks), float64.
        """
        self._flush()
        found = self._constant.repeat(len(weights), 1)
        for places, values in self._nodes:
            ratios = (_coordinates(places, self._ratios) * self._spacing).exp().float()
            matrices = values.float().view(len(places), self._sources, len(self._pairs)).permute(2, 0, 1).contiguous()
            for rows in _slices(len(weights), _MIXES):
                for columns in _slices(len(places), _NODES):
                    found[rows] += self._tile(weights[rows].float(), ratios[columns], matrices[:, columns]).double()
        return found

    def _tile(self, weights: Tensor, ratios: Tensor, matrices: Tensor) -> Tensor:
        """1/2 y^T M_t y - (M_t y)_t of some mixes, summed over some nodes."""
        factors = self._factors(weights, ratios)
        found = weights.new_zeros(len(weights), self._sources)
        for (s, u), matrix in zip(self._pairs, matrices, strict=True):
            found += (factors[s] * factors[u]) @ matrix * (0.5 if s == u else 1.0)
            found[:, s] -= factors[u] @ matrix[:, s]
            if s != u:
                found[:, u] -= factors[s] @ matrix[:, u]
        return found

    def _factors(self, weights: Tensor, ratios: Tensor) -> list[Tensor]:
        """The factors y of some mixes at some nodes, one (mixes, nodes) per source."""
        if self._prior:
            parts = torch.addmm(torch.ones(()), weights, ratios.T).reciprocal_()
            return [weights[:, s : s + 1] * (1 + ratios[:, s]) * parts for s in range(self._sources)]
        ratios = torch.cat([torch.ones(len(ratios), 1), ratios], dim=1)
        parts = (weights @ ratios.T).reciprocal_()
        return [weights[:, s : s + 1] * ratios[:, s] * parts for s in range(self._sources)]


def _key(at: Tensor) -> Tensor:
    """One number for the coordinates of a place on the grid, shape (places,); sums of them are sums of coordinates."""
    scale = torch.tensor([_SIDE**axis for axis in range(at.shape[1])], dtype=torch.long)
    return ((at + _SIDE // 2) * scale).sum(dim=1)


def _coordinates(keys: Tensor, axes: int) -> Tensor:
    """The coordinates that a key stands for, shape (places, axes)."""
    parts = [keys.div(_SIDE**axis, rounding_mode="floor") % _SIDE - _SIDE // 2 for axis in range(axes)]
    return torch.stack(parts, dim=1) if parts else keys.new_zeros(len(keys), 0)


def _cubic(part: Tensor) -> Tensor:
    """Weights of the nodes at -1, 0, 1, 2 along every axis, multiplied, shape (entries, 4 ** axes)."""
    f = part
    along = torch.stack(
        [
            f * (1 - f) * (f - 2) / 6,
            (f + 1) * (1 - f) * (2 - f) / 2,
            (f + 1) * f * (2 - f) / 2,
            (f + 1) * f * (f - 1) / 6,
        ],
        dim=2,
    )
    weights = part.new_ones(len(part), 1)
    for axis in range(part.shape[1]):
        weights = (weights[:, :, None] * along[:, axis, None, :]).flatten(1)
    return weights


def _slices(count: int, size: int) -> Sequence[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
