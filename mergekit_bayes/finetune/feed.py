"""The micro-batches of every optimizer step, from any step of the run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mergekit_bayes.data import batches, collate

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.data import Rows, Task

__all__ = ["Feed", "StepData"]


@dataclass(frozen=True)
class StepData:
    """What one process gets for one optimizer step.

    Attributes:
        micro_batches: at least one, as many as the other processes have; tensors on CPU.
        units: of the whole step, over all processes.
        tokens: of the rows of this process, without padding.
    """

    micro_batches: list[dict[str, Tensor]]
    units: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Deals the rows of every epoch to steps, micro-batches and processes.

    Attributes:
        rows: the training data.
        pad_token_id: fills short rows.
        seed: of the order of the rows.
        batch_size: rows of one micro-batch.
        accumulation: micro-batches of one step.
        rank: of this process.
        world: number of processes.
        workers: processes that collate ahead of time; 0 for none.
        flatten: put packed rows behind one another, as flash attention wants them.
    """

    rows: Rows
    pad_token_id: int
    seed: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1
    workers: int = 0
    flatten: bool = False

    @property
    def task(self) -> Task:
        """What the rows are for."""
        return self.rows.task

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.world

    def units(self, steps: int, steps_per_epoch: int) -> int:
        """Returns the training units of the first so many steps, repetitions counted."""
        whole, rest = divmod(steps, steps_per_epoch)
        full = sum(units for epoch in range(whole) for _, units in self._dealt(epoch))
        return full + sum(units for _, units in islice(self._dealt(whole), rest))

    def steps(self, *, first: int, steps_per_epoch: int) -> Iterator[StepData]:
        """Yields the data of the step after `first` steps, and of all that follow, without end.

        Args:
            first: steps already taken.
            steps_per_epoch: of a whole epoch.
        """
        epoch, done = divmod(first, steps_per_epoch)
        while True:
            yield from self._epoch(epoch, skip=done)
            epoch, done = epoch + 1, 0

    def _epoch(self, epoch: int, *, skip: int) -> Iterator[StepData]:
        plan = list(self._dealt(epoch))[skip:]
        loaded = iter(self._loader([indices for micro_batches, _ in plan for indices in micro_batches]))
        for micro_batches, units in plan:
            tokens = sum(int(self.rows.lengths[indices].sum()) for indices in micro_batches if indices)
            yield StepData([next(loaded) for _ in micro_batches], units, tokens)

    def _dealt(self, epoch: int) -> Iterator[tuple[list[list[int]], int]]:
        return batches(
            self.rows,
            seed=self.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            rank=self.rank,
            world=self.world,
            accumulation=self.accumulation,
        )

    def _loader(self, order: Sequence[Sequence[int]]) -> Any:
        import torch
        from torch.utils.data import DataLoader

        return DataLoader(
            _Collated(self),  # type: ignore[arg-type]  # anything with __getitem__ will do
            sampler=order,  # its keys are lists of row numbers
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global one
        )


@dataclass(frozen=True)
class _Collated:
    """The rows as a data set whose keys are lists of row numbers."""

    feed: Feed

    def __getitem__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        feed = self.feed
        rows = [feed.rows[index] for index in indices]
        return collate(rows, pad_token_id=feed.pad_token_id, task=feed.task, flatten=feed.flatten)
