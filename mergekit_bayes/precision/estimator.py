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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import DataError, ModelError, NonFiniteError, ShapeMismatchError
from mergekit_bayes.precision.chunks import Chunk, chunks
from mergekit_bayes.precision.observe import Observation, observe, prepared
from mergekit_bayes.precision.signals import SIGNALS, SignalName
from mergekit_bayes.precision.squares import Squares
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
        signal: what is sent backwards through the model (`signals`); None if nothing is: then a pass is much cheaper.
        passes: how often all rows have to be shown.
    """

    name: ClassVar[str]
    family: ClassVar[Literal["diagonal", "kronecker"]]
    signal: ClassVar[SignalName | None]

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
        if model.training:
            raise ModelError(f"{type(model).__name__}: is in training mode; call eval() first: dropout is no curvature")
        self.model = model
        self.targets = targets
        self.seed = seed
        self.chunk_size = chunk_size
        self.options = options
        self.passes = 1
        self._squares = Squares(model, targets)
        self._one_by_one = False

    @classmethod
    @abstractmethod
    def size(cls, target: Target, options: Mapping[str, object] = MappingProxyType({})) -> int:
        """Returns the bytes that are kept for a target throughout, for `Targets.groups`."""

    def start_pass(self, index: int) -> None:
        """Begins pass `index`, counted from 0; later ones with the sums of the whole pass before loaded."""
        if not 0 <= index < self.passes:
            raise ValueError(f"estimator {self.name} has passes 0 to {self.passes - 1}, got {index}")

    def update(self, batch: Mapping[str, Tensor]) -> Counts:
        """Adds all rows of a batch that have a label.

        Rows whose logits, inputs or gradients are not finite leave no trace but their number.

        Raises:
            DataError: labels that are missing, of another shape, or that are no class of the model's.
            ModelError: an output that has no logits.
        """
        counts = Counts()
        for chunk in chunks(batch, self.chunk_size):
            self._squares.check(chunk)
            counts += self._show(chunk)
        return counts

    def sums(self) -> dict[str, Tensor]:
        """Returns the sums of the pass so far: not copies; those of several processes may be added up."""
        return dict(self._totals())

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Replaces the sums of the pass so far by copies.

        Raises:
            ShapeMismatchError: names or shapes are not those of `sums`.
        """
        totals = self._totals()
        if totals.keys() != sums.keys() or any(totals[name].shape != value.shape for name, value in sums.items()):
            different = sorted(totals.keys() ^ sums.keys()) or [n for n in totals if totals[n].shape != sums[n].shape]
            seen = f"estimator {self.name}: sums of another estimator, model or pass: {', '.join(different[:3])} differ"
            raise ShapeMismatchError(f"{seen}; expected those that this one gave")
        for name, value in sums.items():
            totals[name].copy_(value)

    def result(self, counts: Counts) -> dict[str, Tensor]:
        """Returns the curvature of the loss summed over the units counted, without any prior; float32.

        By the names of the targets; for Kronecker factors with `.input_factor`, `.output_factor` and `.eigenvalues`
        appended and a first dimension of 1, the number of terms. `scaled(..., N / counts.units)` is that of N units.

        Raises:
            DataError: nothing was counted.
            NonFiniteError: a sum overflowed.
        """
        if counts.units < 1:
            raise DataError(f"estimator {self.name}: no row was counted; expected at least one with a label")
        curvature = {name: value.float() for name, value in self._curvature().items()}
        for name, value in curvature.items():
            if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
                raise NonFiniteError(f"the curvature of {name!r} is not finite: squares of gradients overflow here")
        return curvature

    @abstractmethod
    def _totals(self) -> Mapping[str, Tensor]:
        """The sums of this pass."""

    @abstractmethod
    def _curvature(self) -> Mapping[str, Tensor]:
        """The result, in any dtype."""

    @abstractmethod
    def _watched(self) -> Iterable[str]:
        """Paths of the modules that this pass has to look at."""

    @abstractmethod
    def _add(self, seen: Observation, chunk: Chunk) -> None:
        """Adds what was seen of a chunk, all of it finite."""

    def _needs_rows(self) -> bool:
        """Whether this pass needs to tell rows apart."""
        return bool(self._squares.totals)

    def _direct(self) -> Mapping[str, nn.Parameter]:
        """Parameters that this pass has to differentiate themselves, one row at a time."""
        return self._squares.direct

    def _show(self, chunk: Chunk) -> Counts:
        alone = len(chunk) == 1
        if alone or not (self._one_by_one or self._direct()):
            seen = self._observe(chunk)
            apart = alone or seen.apart or not self._needs_rows()
            if apart and seen.finite:
                with torch.no_grad():  # a module's own function may depend on other parameters of it
                    self._add(seen, chunk)
                return Counts(len(chunk), chunk.units)
            if alone:
                return Counts(skipped=chunk.numbers)
            self._one_by_one |= not apart
        counts = Counts()
        for row in chunk.single_rows():
            counts += self._show(row)
        return counts

    def _observe(self, chunk: Chunk) -> Observation:
        watched, direct = dict.fromkeys(self._watched()), self._direct()
        signal = None if self.signal is None else SIGNALS[self.signal]
        with prepared(self.model, direct.values()):
            return observe(self.model, chunk, watched, signal=signal, seed=self.seed, direct=direct)
