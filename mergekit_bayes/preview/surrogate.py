r"""What the posteriors themselves predict: the loss increase of every task at every mix, from no data at all.

The posterior N(m_t, 1/S_t) of a source says that around m_t its task's loss is a quadratic with curvature
H_t = S_t - S_0,

    loss_t(m) - loss_t(m_t) = 1/2 sum_i H_ti (m_i - m_ti)^2 ,

and a mix says where m is. With d_s = m_s - theta_0, the moves of the sources, entry by entry:

    weighted sums      m - theta_0 = sum_s c_s d_s                                    (equal precisions)
    the rule           m - theta_0 = sum_s beta_s S_s d_s / sum_u beta_u S_u

where beta holds the weights alpha of the sources and, with d = 0, the prior's share 1 - sum alpha. For weighted sums
the increase is a quadratic form in c, whose matrices sum_i H_ti d_si d_ui take one pass over the model for any number
of mixes (`QuadraticForms`); for the rule every mix is summed over the entries, in tiles that stay in the caches
(`rule_increases`).

Pure functions of tensors; they know no file and no recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "QuadraticForms", "rule_increases", "shares_of"]

_MIXES, _ENTRIES = 128, 2048  # what is worked on at a time: temporaries of 1 MiB


class Block(NamedTuple):
    """Some entries of a model, float64.

    Attributes:
        moves: d_s = m_s - theta_0, shape (sources, entries).
        curvature: H_t = S_t - S_0 of every source's task, shape (sources, entries).
    """

    moves: Tensor
    curvature: Tensor


class QuadraticForms:
    """The increases of mixes that are weighted sums of the moves.

    Args:
        sources: number of sources.

    Attributes:
        gram: G_t = sum_i H_ti d_si d_ui, shape (tasks, sources, sources), float64.
    """

    def __init__(self, sources: int) -> None:
        self.gram = torch.zeros(sources, sources, sources, dtype=torch.float64)

    def add(self, block: Block) -> None:
        """Take in some entries."""
        self.gram += (block.curvature[:, None] * block.moves) @ block.moves.T

    @property
    def at_base(self) -> Tensor:
        """Increase of every task at the base, shape (tasks,)."""
        return self.gram.diagonal(dim1=0, dim2=1).diagonal() / 2

    def increases(self, coefficients: Tensor) -> Tensor:
        r"""1/2 (c - e_t)^T G_t (c - e_t).

        Args:
            coefficients: c, shape (mixes, sources), float64.

        Returns:
            Shape (mixes, tasks).
        """
        count = coefficients.shape[1]
        gaps = coefficients[:, None] - torch.eye(count, dtype=coefficients.dtype)
        return torch.einsum("kts,tsu,ktu->kt", gaps, self.gram, gaps) / 2


def shares_of(weights: Tensor, *, prior: bool) -> Tensor:
    """beta: the weights of every mix, and what they leave for the prior.

    Args:
        weights: alpha, shape (mixes, sources).
        prior: whether the method has one; without it nothing is left.

    Returns:
        Shape (mixes, sources + 1).
    """
    rest = 1 - weights.sum(dim=1, keepdim=True)
    rest = torch.where(rest.abs() < 1e-12, 0.0, rest) if prior else torch.zeros_like(rest)
    return torch.cat([weights, rest], dim=1)


def rule_increases(block: Block, precisions: Tensor, shares: Tensor, *, floor: float | None = None) -> Tensor:
    r"""What some entries add to the increase of every task: 1/2 sum H x^2 - sum H d x + 1/2 sum H d^2.

    Single products are float32, sums over tiles float64; the error is of the size of float32's rounding relative to the
    increase at the base.

    Args:
        block: the entries.
        precisions: S_s as the method has them, and S_0 as the last row, shape (sources + 1, entries).
        shares: beta, shape (mixes, sources + 1).
        floor: lower bound of the merged precision.

    Returns:
        Shape (mixes, tasks), float64; NaN where a mix leaves a precision that is not positive.
    """
    moves, curvature = block
    constant = (curvature * moves.square()).sum(dim=1) / 2
    found = constant.repeat(len(shares), 1)
    beta, density = shares.float(), precisions.float()
    pull = (precisions[:-1] * moves).float()
    half, slope = (curvature / 2).float().T, (curvature * moves).float().T
    for rows, columns in _tiles(len(shares), moves.shape[1]):
        precision = beta[rows] @ density[:, columns]
        if floor is not None:
            precision.clamp_(min=floor)
        merged = (beta[rows, :-1] @ pull[:, columns]).div_(precision)
        linear = merged @ slope[columns]
        found[rows] += (merged.square_() @ half[columns]).sub_(linear).double()
        found[rows][~(precision.amin(dim=1) > 0)] = torch.nan
    return found


def _tiles(mixes: int, entries: int) -> Iterator[tuple[slice, slice]]:
    rows = [slice(start, start + _MIXES) for start in range(0, mixes, _MIXES)]
    columns = [slice(start, start + _ENTRIES) for start in range(0, entries, _ENTRIES)]
    yield from itertools.product(rows, columns)
