r"""The mean of probabilities that arrive as logarithms, one sample at a time.

    log p(y) = log (1/S) sum_s p_s(y) = logsumexp_s log p_s(y) - log S

The average is over probabilities: averaging logits or log-probabilities gives another, sharper prediction, which is not
the posterior's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LogMean", "Mean", "entropy"]


class LogMean:
    """A running log-mean-exp."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, log_values: Tensor) -> None:
        """Adds the logarithms of one sample; all samples have one shape."""
        self._total = log_values if self._total is None else torch.logaddexp(self._total, log_values)
        self._count += 1

    def result(self) -> Tensor:
        """Returns the logarithm of the mean so far."""
        return _some(self._total) - math.log(self._count)


class Mean:
    """A running mean."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0

    def add(self, values: Tensor) -> None:
        """Adds the values of one sample; all samples have one shape."""
        self._total = values if self._total is None else self._total + values
        self._count += 1

    def result(self) -> Tensor:
        """Returns the mean so far."""
        return _some(self._total) / self._count


def entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy of distributions over the last dimension, in nats; a probability of zero adds nothing."""
    terms: Tensor = torch.special.entr(log_probabilities.exp())
    return terms.sum(-1)


def _some(total: Tensor | None) -> Tensor:
    assert total is not None, "an average of nothing"
    return total
