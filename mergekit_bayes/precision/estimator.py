"""What every estimator of precisions from data offers to whoever feeds it.

    estimator = create("kfac", model, targets, seed=0, options={"eigenvalues": True})
    for index in range(estimator.passes):
        estimator.start_pass(index)
        for batch in batches:                           # those of this process
            counts += estimator.update(batch)
        estimator.load_sums(added_up_over_processes(estimator.sums()))
    curvature = estimator.result(counts)                # counts of one pass, added up over processes

Nothing but sums is kept, so that any number of processes can share the rows, and a pass can be interrupted and go on:
save `sums` with the number of rows seen, and give them to `load_sums` of a new estimator. What is drawn at random for a
row depends on the seed and the row's number only, so no result depends on how rows are cut into batches, chunks or
processes, other than in the last bits.

A batch is a mapping of tensors whose first dimension counts rows: inputs of the model by name,

    labels  (rows, tokens) of a language model, as `data.collate` makes them: -100 where there is no loss, and the
            logits at token t predict the label of token t + 1; or (rows,) of a classifier; int64
    row     (rows,) int64: the number of each row in the data, which names it in messages and seeds what is drawn for it

A unit is a predicted token of a language model or a row of a classifier.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from torch import Tensor, nn

from mergekit_bayes.precision.targets import Target, Targets

__all__ = ["Counts", "Estimator"]


@dataclass(frozen=True)
class Counts:
    """What sums were taken over.

    Attributes:
        rows: that were looked at and not skipped.
        units: predicted tokens, or examples of a classifier, in these rows.
        skipped: numbers of the rows with gradients, inputs or logits that are not finite, in the order they were met.
    """

    rows: int = 0
    units: int = 0
    skipped: tuple[int, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rows + other.rows, self.units + other.units, self.skipped + other.skipped)


class Estimator(ABC):
    """Sums statistics of rows and turns them into curvature.

    Args:
        model: with its weights in place, in evaluation mode and on its device; for packed rows without a cache of keys
            and values. It is never changed.
        targets: of `find_targets`.
        seed: of whatever is drawn at random, together with a row's number.
        chunk_size: rows looked at at once, which bounds memory beside the sums.
        options: resolved options of the estimator's `EstimatorSpec`.

    Attributes:
        name: in the registry.
        family: of the posterior that results describe.
        needs_backward: whether gradients are computed; without them a pass is much cheaper.
        passes: how often all rows have to be shown.
    """

    name: ClassVar[str]
    family: ClassVar[Literal["diagonal", "kronecker"]]
    needs_backward: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        seed: int = 0,
        chunk_size: int = 8,
        options: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.model = model
        self.targets = targets
        self.seed = seed
        self.chunk_size = chunk_size
        self.options = options
        self.passes = 1

    @classmethod
    @abstractmethod
    def size(cls, target: Target, options: Mapping[str, object] = MappingProxyType({})) -> int:
        """Returns the bytes that are kept for a target throughout, for `Targets.groups`."""

    def start_pass(self, index: int) -> None:
        """Begins pass `index`, counted from 0; of later ones, with the sums of the whole pass before loaded."""
        if not 0 <= index < self.passes:
            raise ValueError(f"estimator {self.name} has passes 0 to {self.passes - 1}, got {index}")

    @abstractmethod
    def update(self, batch: Mapping[str, Tensor]) -> Counts:
        """Adds all rows of a batch.

        Rows whose logits, inputs or gradients are not finite leave no trace but their number.

        Raises:
            DataError: labels that are missing, of another shape, or that are no class of the model's.
            ModelError: an output that has no logits, or a target that is never used.
        """

    @abstractmethod
    def sums(self) -> dict[str, Tensor]:
        """Returns the sums of the pass so far: not copies; those of several processes may be added up."""

    @abstractmethod
    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Replaces the sums of the pass so far.

        Raises:
            ShapeMismatchError: names or shapes are not those of `sums`.
        """

    @abstractmethod
    def result(self, counts: Counts) -> dict[str, Tensor]:
        """Returns the curvature of the loss summed over the units counted, without any prior; float32.

        By the names of the targets; for Kronecker factors with `.input_factor`, `.output_factor` and `.eigenvalues`
        appended and a first dimension of 1, the number of terms. Divide by `counts.units` and multiply by N for the
        curvature of N units: a diagonal, or one factor of each layer (`output_factor` or, where there is none,
        `input_factor`; with eigenvalues, these).

        Raises:
            DataError: nothing was counted.
            NonFiniteError: a sum overflowed.
        """
