"""The posteriors of base and sources, tensor by tensor or block by block, as the steps of dense merges have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.merge.blocks import as_posterior
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.steps import MergeStep, TensorStep
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.elementwise import Elementwise
from mergekit_bayes.preview.surrogate import Block, QuadraticForms

__all__ = ["Piece", "add_products", "block_of", "in_layout", "own_piece", "pieces_of", "precisions_of"]

_ENTRIES = 1 << 20  # read at a time


class Piece(NamedTuple):
    """Some entries of a tensor, or all of them.

    Attributes:
        base: theta_0 and S_0.
        sources: by label, those that have a say in the tensor.
        start: first entry.
        stop: one past the last.
    """

    base: Posterior
    sources: Mapping[str, Posterior]
    start: int
    stop: int

    @property
    def elementwise(self) -> bool:
        """Whether all precisions act entry by entry."""
        return all(isinstance(posterior, Elementwise) for posterior in (self.base, *self.sources.values()))


def pieces_of(step: MergeStep, operands: OperandReader, *, whole: bool) -> Iterator[Piece]:
    """Reads a tensor in blocks, or as a whole.

    Args:
        step: of a dense merge.
        operands: reads them.
        whole: whether a method has to see all of it.
    """
    if isinstance(step, TensorStep):
        yield whole_piece(step, operands)
        return
    row = max(1, step.shape[-1]) if step.shape else 1
    size = max(step.numel, 1) if whole else max(1, _ENTRIES // row) * row
    for start in range(0, step.numel, size):
        yield block_piece(step, operands, start, min(start + size, step.numel))


def whole_piece(step: TensorStep, operands: OperandReader) -> Piece:
    """A tensor as (out_features, in_features) where it is a linear layer's."""
    base = operands.posterior(step.base, step, None)
    prior = base.precision_tensor()
    sources = {source.label: operands.posterior(source, step, prior) for source in step.sources}
    return Piece(base, sources, 0, step.numel)


def block_piece(step: MergeStep, operands: OperandReader, start: int, stop: int) -> Piece:
    """Entries of a tensor, flat, as it is stored."""
    stored, others = operands.block(step, start, stop)
    base = as_posterior(stored, None, operands.dtype)
    found = [as_posterior(other, base.precision_tensor(), operands.dtype) for other in others]
    sources = {source.label: posterior for source, posterior in zip(step.sources, found, strict=True)}
    return Piece(base, sources, start, stop)


def own_piece(mine: MergeStep, step: MergeStep, piece: Piece, operands: OperandReader) -> Piece:
    """The same entries as another step of the tensor has them; not read again where they are the same.

    Args:
        mine: the other step, of the method's own merge.
        step: that the piece is of.
        piece: the entries.
        operands: reads them.
    """
    if type(mine) is type(step) and replace(mine, weights=step.weights, options=step.options) == step:
        return piece
    if isinstance(mine, TensorStep):
        return whole_piece(mine, operands)
    return block_piece(mine, operands, piece.start, piece.stop)


def block_of(piece: Piece, labels: Sequence[str]) -> Block:
    """Moves and curvatures of all sources; one without a say has neither."""
    origin, prior = piece.base.mean.reshape(-1), _flat(piece.base)
    moves = [piece.sources[label].mean.reshape(-1) - origin if label in piece.sources else None for label in labels]
    bent = [_flat(piece.sources[label]) - prior if label in piece.sources else None for label in labels]
    nothing = torch.zeros_like(origin)
    return Block(
        torch.stack([nothing if move is None else move for move in moves]),
        torch.stack([nothing if each is None else each for each in bent]),
    )


def precisions_of(piece: Piece, labels: Sequence[str], *, prior: bool) -> Tensor:
    """S_s of all sources, and S_0 as the last row; a source without a say knows what the prior knows.

    Args:
        piece: of the method's own merge.
        labels: of the sources.
        prior: whether the method has one.
    """
    base = _flat(piece.base) if prior else torch.zeros_like(piece.base.mean.reshape(-1))
    found = [_flat(piece.sources[label]) if label in piece.sources else base for label in labels]
    return torch.stack([*found, base])


def _flat(posterior: Posterior) -> Tensor:
    return posterior.precision_tensor().expand_as(posterior.mean).reshape(-1)


def add_products(forms: QuadraticForms, piece: Piece, labels: Sequence[str]) -> None:
    """Products of the moves under curvatures that are no diagonals, from sums and differences of quadratic forms."""
    moves = {label: source.mean - piece.base.mean for label, source in piece.sources.items()}
    for t, task in enumerate(labels):
        if task not in piece.sources:
            continue
        own = {label: _bend(piece, task, move) for label, move in moves.items()}
        for s, first in enumerate(labels):
            for u, second in enumerate(labels):
                if first in moves and second in moves:
                    both = own[first] if s == u else _bend(piece, task, moves[first] + moves[second])
                    forms.gram[t, s, u] += own[first] if s == u else (both - own[first] - own[second]) / 2


def _bend(piece: Piece, task: str, move: Tensor) -> float:
    return float(piece.sources[task].quadratic(move) - piece.base.quadratic(move))


def in_layout(mean: Tensor, own: MergeStep, step: MergeStep) -> Tensor:
    """A merged mean of one step in the layout in which another step of the same tensor has its posteriors."""
    if isinstance(own, TensorStep) and own.transposed:
        mean = mean.T
    if not isinstance(step, TensorStep):
        return mean.reshape(-1)
    mean = mean.reshape(step.shape)
    return mean.T if step.transposed else mean
