"""The data-free tier: what the posteriors of the sources predict for every mix, from one pass over their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.registry import Merge
from mergekit_bayes.merge.steps import MergeStep, TensorStep
from mergekit_bayes.posterior.mismatch import mismatch
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.form import Form, form_of
from mergekit_bayes.preview.pieces import (
    Piece,
    add_products,
    block_of,
    in_layout,
    own_piece,
    pieces_of,
    precisions_of,
)
from mergekit_bayes.preview.plans import MethodPlan, reweighted
from mergekit_bayes.preview.ratios import MOST_RATIOS, SharedRatios
from mergekit_bayes.preview.surrogate import QuadraticForms, rule_increases, shares_of

__all__ = ["Prediction", "Predictions", "predict"]

Array: TypeAlias = NDArray[np.float64]

EXACT_MIXES = 512
"""So many mixes of a method are summed entry by entry; more of them are gathered by ratios where that is possible."""

CHECKED_MIXES = 64
"""So many of those are summed entry by entry too, to know the error."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the posteriors predict for one method.

    Attributes:
        increases: loss increase of every source's task over its own expert, shape (mixes, sources).
        form: what the method does to the moves of its sources.
        error: largest error of mixes that were gathered by ratios, relative to the increase at the base; 0 where all
            are exact.
    """

    increases: Array
    form: Form
    error: float


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the posteriors predict.

    Attributes:
        methods: one prediction for every method, in order.
        at_base: increase of every source's task at the base, shape (sources,).
        at_sources: increases at the sources themselves, shape (sources, tasks).
    """

    methods: tuple[Prediction, ...]
    at_base: Array
    at_sources: Array


def predict(curvature: MergePlan, methods: Sequence[tuple[MethodPlan, Sequence[Mix]]]) -> Predictions:
    """Predicts the loss increase of every source's task at every mix.

    Args:
        curvature: the dense plan whose posteriors say what the losses are; see `plans.curvature_plan`.
        methods: dense plans of the methods, with their mixes.

    Raises:
        NumericalError: a mean or a precision that no posterior can have.
    """
    labels = [source.label for source in curvature.sources]
    sweeps = [_sweep(plan, mixes) for plan, mixes in methods]
    forms = QuadraticForms(len(labels))
    with BlockReader() as reader:
        operands = OperandReader(reader, torch.float64, "cpu")
        for step in curvature.steps:
            if isinstance(step, MergeStep):
                _take_in(step, labels, forms, sweeps, operands)
    found = tuple(sweep.finished(forms) for sweep in sweeps)
    corners = forms.increases(torch.eye(len(labels), dtype=torch.float64))
    return Predictions(found, forms.at_base.numpy(), corners.numpy())


class _Sweep:
    """The mixes of one method, and what has been added up for them so far."""

    def __init__(self, plan: MethodPlan, weights: Tensor, form: Form) -> None:
        self.plan, self.weights, self.form = plan, weights, form
        self.prior = plan.plan.method.prior == "required"
        self.floor = plan.plan.recipe.precision.floor
        self.steps = {step.name: step for step in plan.plan.steps if isinstance(step, MergeStep)}
        self.ratios = self._gathered()
        count = len(weights)
        self.exact = torch.arange(count) if self.ratios is None else torch.linspace(0, count - 1, CHECKED_MIXES).long()
        self.total = torch.zeros(len(self.exact), weights.shape[1], dtype=torch.float64)

    def _gathered(self) -> SharedRatios | None:
        """Where thousands of mixes under the rule are gathered by ratios."""
        count, sources = self.weights.shape
        shared = bool((shares_of(self.weights, prior=self.prior)[:, -1] != 0).any())
        possible = self.floor is None and bool((self.weights >= 0).all()) and sources - (not shared) <= MOST_RATIOS
        wanted = self.form == "rule" and count > EXACT_MIXES
        return SharedRatios(sources, prior=shared) if wanted and possible else None

    def add_rule(self, piece: Piece, own: Piece, labels: Sequence[str]) -> None:
        """Takes in entries whose merge follows the rule."""
        block, precisions = block_of(piece, labels), precisions_of(own, labels, prior=self.prior)
        shares = shares_of(self.weights[self.exact], prior=self.prior)
        self.total += rule_increases(block, precisions, shares, floor=self.floor)
        if self.ratios is not None:
            self.ratios.add(block, precisions)

    def add_merges(self, step: MergeStep, piece: Piece, own: Piece, labels: Sequence[str]) -> None:
        """Takes in entries by merging them once for every mix."""
        mine = self.steps[step.name]
        for row, index in enumerate(self.exact.tolist()):
            weights = dict(zip(labels, self.weights[index].tolist(), strict=True))
            alpha = torch.tensor(reweighted(mine, weights).weights, dtype=torch.float64)  # type: ignore[union-attr]
            sources = [own.sources[source.label] for source in mine.sources]
            kernel = self.plan.plan.method.kernel
            found = Merge.of(kernel(own.base, sources, alpha, floor=self.floor, **dict(mine.options)))
            mean = in_layout(found.posterior.mean, mine, step)
            for column, label in enumerate(labels):
                if label in piece.sources:
                    self.total[row, column] += float(mismatch(mean, piece.sources[label], piece.base))

    def finished(self, forms: QuadraticForms) -> Prediction:
        """All increases, once every tensor was taken in."""
        if self.form == "sum":
            return Prediction(forms.increases(self.weights).numpy(), self.form, 0.0)
        if self.ratios is None:
            return Prediction(self.total.numpy(), self.form, 0.0)
        gathered = self.ratios.increases(self.weights)
        error = (gathered[self.exact] - self.total).abs() / forms.at_base
        gathered[self.exact] = self.total
        return Prediction(gathered.numpy(), self.form, float(error.nan_to_num(0.0).max()))


def _sweep(plan: MethodPlan, mixes: Sequence[Mix]) -> _Sweep:
    weights = torch.tensor([plan.effective(mix) for mix in mixes], dtype=torch.float64)
    method = plan.plan.method
    step = next((step for step in plan.plan.steps if isinstance(step, MergeStep)), None)
    form = form_of(method, {} if step is None else dict(step.options))
    summing = method.base == "required" or bool(((weights.sum(dim=1) - 1).abs() < 1e-9).all())
    return _Sweep(plan, weights, "other" if form == "sum" and not summing else form)


def _take_in(
    step: MergeStep, labels: Sequence[str], forms: QuadraticForms, sweeps: Sequence[_Sweep], operands: OperandReader
) -> None:
    """Adds what one tensor says to every sweep that has not all of it in the quadratic forms."""
    active = [sweep for sweep in sweeps if sweep.form != "sum" and step.name in sweep.steps]
    whole = any(isinstance(sweep.steps[step.name], TensorStep) for sweep in active)
    for piece in pieces_of(step, operands, whole=whole):
        if piece.elementwise:
            forms.add(block_of(piece, labels))
        else:
            add_products(forms, piece, labels)
        for sweep in active:
            own = own_piece(sweep.steps[step.name], step, piece, operands)
            if sweep.form == "rule" and piece.elementwise and own.elementwise:
                sweep.add_rule(piece, own, labels)
            else:
                sweep.add_merges(step, piece, own, labels)
