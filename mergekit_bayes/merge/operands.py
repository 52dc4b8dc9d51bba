"""From operands on disk to blocks in memory: the one place where a plan's byte ranges become tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.kronecker_tensors import read_terms
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.merge.blocks import Stored, as_posterior
from mergekit_bayes.merge.checks import check_block, check_precision
from mergekit_bayes.merge.curvature import Curvature
from mergekit_bayes.merge.lora import Factors, product_mean, product_precision
from mergekit_bayes.merge.steps import LowRank, MergeStep, Operand, TensorStep
from mergekit_bayes.posterior import Kronecker, Posterior, Term


class OperandReader:
    """Reads operands, whole or in blocks.

    Args:
        reader: the open input files.
        dtype: compute dtype.
        device: where tensors are put.
    """

    def __init__(self, reader: BlockReader, dtype: torch.dtype, device: str) -> None:
        self._reader = reader
        self.dtype = dtype
        self.device = device

    def block(self, step: MergeStep, start: int, stop: int) -> tuple[Stored, list[Stored]]:
        """Base and sources of one block.

        Args:
            step: the step; if an operand has a low-rank update, `start` and `stop` lie on row boundaries.
            start: first element of the block.
            stop: one past the last.

        Raises:
            NonPositivePrecisionError: a sidecar holds a precision that is not positive and finite.
        """
        base = self._stored(step.base, step, start, stop)
        return base, [self._stored(source, step, start, stop) for source in step.sources]

    def posterior(self, operand: Operand, step: TensorStep, prior: Tensor | None) -> Posterior:
        """One operand of a tensor that is merged whole, as (out_features, in_features) where it is a linear layer's.

        Args:
            operand: base or source of the step.
            step: the step.
            prior: S_0 of the merge in the same orientation, which takes the place of the operand's own; None for the
                base.

        Raises:
            NumericalError: a precision is not positive and finite.
        """
        stored = self._stored(operand, step, 0, step.numel)
        whole = [each.reshape(step.shape) if each.dim() else each for each in (stored.mean, stored.precision)]
        if step.transposed:
            whole = [each.T.contiguous() if each.dim() else each for each in whole]
        found = as_posterior(stored._replace(mean=whole[0], precision=whole[1]), prior, self.dtype)
        if operand.curvature is None:
            return found
        return Kronecker.unchecked(found.mean, found.precision_tensor(), self.terms(operand.curvature))

    def update_posterior(self, operand: Operand, mean: Tensor, rows: slice, base: Posterior) -> Posterior:
        """The posterior of some rows of an update whose own precision a sidecar has.

        Args:
            operand: with that precision, of shape (out_features, in_features).
            mean: those rows of its mean.
            rows: which ones.
            base: the prior of those rows.

        Raises:
            NumericalError: a precision is not positive and finite.
        """
        assert isinstance(operand.precision, TensorInfo)  # this is what `of_update` says
        start, _, _ = rows.indices(operand.precision.shape[0])
        block = self.precision_block(operand.precision, start * mean.shape[1], mean.numel())
        precision = block.to(self.device).reshape(mean.shape)
        divisor = None if operand.divisor == 1.0 else self._scalar(operand.divisor)
        stored = Stored(mean, precision, divisor, self._scalar(operand.prior_share), operand.floor)
        return as_posterior(stored, base.precision_tensor(), self.dtype)

    def precision_block(self, tensor: TensorInfo, start: int, count: int) -> Tensor:
        """Some elements of a precision, checked, as they are stored.

        Raises:
            NumericalError: a precision is not positive and finite.
        """
        block = self._reader.read_block(tensor, start, count)
        check_precision(block, tensor.name, str(tensor.path))
        return block

    def terms(self, curvature: Curvature) -> list[Term]:
        """The Kronecker terms of a source, divided as its precision is.

        Raises:
            NumericalError: a factor is not finite or not symmetric, or a curvature is negative.
        """
        terms = read_terms(curvature.factors, self._reader, dtype=self.dtype, device=self.device)
        return terms if curvature.divisor == 1.0 else [term.scaled(1.0 / curvature.divisor) for term in terms]

    def _stored(self, operand: Operand, step: MergeStep, start: int, stop: int) -> Stored:
        if operand.mean is None:
            mean = torch.zeros(stop - start, dtype=self.dtype, device=self.device)
        else:
            mean = self._reader.read_block(operand.mean, start, stop - start).to(self.device)
        precision = self._precision(operand, start, stop)
        if operand.low_rank is not None:
            columns = step.shape[-1]
            rows = slice(start // columns, stop // columns)
            factors = _oriented(self.factors(operand.low_rank), operand.low_rank.transposed)
            mean = mean.to(self.dtype) + product_mean(factors, rows).reshape(-1)
            if precision is None:
                precision = product_precision(factors, rows).reshape(-1)
        assert precision is not None  # the plan gives every operand of a merge step a precision
        divisor = None if operand.divisor == 1.0 else self._scalar(operand.divisor)
        taken_out = operand.low_rank is not None and operand.low_rank.prior is not None
        return Stored(mean, precision, divisor, self._scalar(0.0 if taken_out else operand.prior_share), operand.floor)

    def _precision(self, operand: Operand, start: int, stop: int) -> Tensor | None:
        if isinstance(operand.precision, TensorInfo):
            block = self._reader.read_block(operand.precision, start, stop - start)
            if operand.turned:  # and then whole
                block = block.reshape(operand.precision.shape).T.reshape(-1)
            check_precision(block, operand.precision.name, str(operand.precision.path))
            return block.to(self.device)
        if operand.precision is None:
            return None
        return torch.tensor(operand.precision, dtype=self.dtype, device=self.device)

    def _scalar(self, value: float | None) -> Tensor | None:
        if value is None:
            return None
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def factors(self, low_rank: LowRank) -> Factors:
        """Both factors of an update with the scaling folded into B, and their variances where a sidecar has them.

        Raises:
            NumericalError: a factor is not finite, or a precision not positive and finite.
        """
        (a, precision_a), (b, precision_b) = self.factor(low_rank, 0), self.factor(low_rank, 1)
        b = b * low_rank.scaling
        if precision_a is None or precision_b is None:
            return Factors(a, b)
        variances = precision_a.reciprocal_(), precision_b.reciprocal_().mul_(low_rank.scaling**2)
        if low_rank.prior is None:
            return Factors(a, b, *variances)
        stretch = (low_rank.trained_scaling or low_rank.scaling) ** 2
        return Factors(a, b, *variances, prior_variance=(1.0 / low_rank.prior, stretch / low_rank.prior))

    def factor(self, low_rank: LowRank, which: int) -> tuple[Tensor, Tensor | None]:
        """Factor A (`which` 0) or B (`which` 1) as it is stored, and its precision where a sidecar has it.

        Raises:
            NumericalError: the factor is not finite, or the precision not positive and finite.
        """
        tensor = (low_rank.a, low_rank.b)[which]
        values = self.whole(tensor)
        check_block(values.reshape(-1), tensor.name, str(tensor.path))
        precision = (low_rank.precision_a, low_rank.precision_b)[which]
        return values, None if precision is None else self.whole_precision(precision)

    def whole(self, tensor: TensorInfo) -> Tensor:
        """A small tensor, whole, in the compute dtype."""
        return self._reader.read_tensor(tensor).to(device=self.device, dtype=self.dtype)

    def whole_precision(self, tensor: TensorInfo) -> Tensor:
        """A small precision tensor, checked, in the compute dtype."""
        stored = self._reader.read_tensor(tensor)
        check_precision(stored.reshape(-1), tensor.name, str(tensor.path))
        return stored.to(device=self.device, dtype=self.dtype)


def _oriented(factors: Factors, transposed: bool) -> Factors:
    """The factors of dW in the orientation of the stored weight: (B A)^T = A^T B^T."""
    if not transposed:
        return factors
    turned = [None if v is None else v.T for v in (factors.variance_b, factors.variance_a)]
    prior = factors.prior_variance
    return Factors(factors.b.T, factors.a.T, turned[0], turned[1], None if prior is None else (prior[1], prior[0]))
