"""Where whole tensors go: a shard of the checkpoint, and the sidecar shard beside it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mergekit_bayes.checkpoint.dtypes import torch_dtype
from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry
from mergekit_bayes.merge.checks import check_block, check_precision


class Sink:
    """Casts, checks and writes whole tensors of one unit; safe to use from several threads.

    Args:
        mean: the shard of the checkpoint or adapter.
        precision: the sidecar shard, or None.
    """

    def __init__(self, mean: ShardWriter, precision: ShardWriter | None) -> None:
        self._mean = mean
        self._precision = precision

    def mean(self, entry: TensorEntry, values: Tensor, what: str) -> None:
        """Write a tensor of the checkpoint.

        Args:
            entry: the tensor.
            values: in any dtype and on any device, of the entry's shape.
            what: it is, for messages.

        Raises:
            NonFiniteError: the values are not finite, or do not fit the entry's dtype.
        """
        stored = _flat(entry, values)
        check_block(stored, entry.name, what)
        self._mean.write(entry.name, 0, stored)

    def precisions(self, values: Mapping[TensorEntry, Tensor]) -> None:
        """Write diagonal precisions to the sidecar, if there is one.

        Raises:
            NonFiniteError: they are not finite, or do not fit the dtype.
            NonPositivePrecisionError: they are zero or negative.
        """
        for entry, precision in values.items() if self._precision is not None else ():
            stored = _flat(entry, precision)
            check_precision(stored, entry.name, "the merged precision")
            self._precision.write(entry.name, 0, stored)  # type: ignore[union-attr]  # not None here

    def factors(self, values: Mapping[TensorEntry, Tensor]) -> None:
        """Write parts of Kronecker terms to the sidecar, if there is one.

        Raises:
            NonFiniteError: they are not finite.
        """
        for entry, part in values.items() if self._precision is not None else ():
            stored = _flat(entry, part)
            check_block(stored, entry.name, "the merged curvature")
            self._precision.write(entry.name, 0, stored)  # type: ignore[union-attr]  # not None here


def _flat(entry: TensorEntry, values: Tensor) -> Tensor:
    return values.to(torch_dtype(entry.dtype)).cpu().reshape(-1).contiguous()
