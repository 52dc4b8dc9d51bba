"""The passes over the rows: each group of targets by itself, block after block, saved now and then.

What is added up depends on the rows alone: not on how many processes share them, nor on whether a run was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.errors import NonFiniteError
from mergekit_bayes.estimate.state import (
    Position,
    SavedPass,
    add_up,
    add_up_counts,
    finished_passes,
    load_pass,
    load_sums,
    save_pass,
    save_sums,
)
from mergekit_bayes.precision.convergence import Change, Convergence
from mergekit_bayes.precision.estimator import Counts, Estimator
from mergekit_bayes.precision.rank import Shortfall, rank_shortfalls

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.estimate.folder import SidecarFolder
    from mergekit_bayes.estimate.progress import Progress
    from mergekit_bayes.estimate.rows import Feed

__all__ = ["GroupSummary", "Passes"]

SAVE_SECONDS = 60.0
"""Time between two saved states: what an interrupted run loses at most, beside the block it was in."""


@dataclass(frozen=True)
class GroupSummary:
    """How the rows were looked at for one group of targets.

    Attributes:
        counts: rows and units of one pass.
        changes: how far the estimate moved, for each pass.
        shortfalls: factors that cannot have full rank.
    """

    counts: Counts
    changes: tuple[tuple[Change, ...], ...]
    shortfalls: tuple[Shortfall, ...]

    def record(self) -> dict[str, Any]:
        """Returns what JSON can hold of it, which is all."""
        return {
            "counts": asdict(self.counts),
            "changes": [[change._asdict() for change in changes] for changes in self.changes],
            "shortfalls": [each._asdict() for each in self.shortfalls],
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> GroupSummary:
        """Returns what `record` was made of."""
        counts = record["counts"]
        return cls(
            Counts(counts["rows"], counts["units"], tuple(counts["skipped"])),
            tuple(tuple(Change(**change) for change in changes) for changes in record["changes"]),
            tuple(Shortfall(**each) for each in record["shortfalls"]),
        )


@dataclass
class Passes:
    """Shows rows to estimators.

    Attributes:
        accelerator: device and processes.
        folder: where states go.
        feed: the rows.
        max_skipped: largest share of rows that may be skipped.
        progress: is told.
    """

    accelerator: Accelerator
    folder: SidecarFolder
    feed: Feed
    max_skipped: float
    progress: Progress
    _saved: SavedPass | None = field(default=None, init=False)
    _last_save: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self._saved = load_pass(self.folder, self.accelerator)

    def run(self, group: int, make: Callable[[], Estimator]) -> tuple[dict[str, Tensor], GroupSummary]:
        """Estimates one group of targets, going on where an interrupted run was.

        Args:
            group: its number.
            make: returns its estimator, before anything was shown to it.

        Returns:
            The curvature of the loss summed over the units counted, and how it came about.

        Raises:
            NonFiniteError: more rows than allowed have gradients that are not finite.
            DataError: rows without labels, or that do not fit the model.
        """
        estimator = make()
        done = finished_passes(self.folder, group)
        summary = GroupSummary.of(done[-1]) if done else GroupSummary(Counts(), (), ())
        self.accelerator.wait_for_everyone()  # everybody has looked before the leading process adds to it
        if done:
            estimator.load_sums(load_sums(self.folder, group, len(done) - 1))
        for index in range(len(done), estimator.passes):
            estimator.start_pass(index)
            counts, moved = self._pass(estimator, group, index)
            shortfalls = summary.shortfalls if index else tuple(rank_shortfalls(estimator.sums()))
            summary = GroupSummary(counts, (*summary.changes, moved), shortfalls)
            if index + 1 < estimator.passes and self.accelerator.is_main_process:
                save_sums(self.folder, group, index, estimator.sums(), summary.record())
        return estimator.result(summary.counts), summary

    def _pass(self, estimator: Estimator, group: int, index: int) -> tuple[Counts, tuple[Change, ...]]:
        convergence = Convergence(estimator.sums(), seed=self.feed.seed)
        counts, begin = Counts(), 0
        saved = self._saved
        if saved is not None and (saved.position.group, saved.position.index) == (group, index):
            counts, begin = saved.counts, saved.position.block
            convergence.records = saved.records
            if saved.sums:  # a process without a share starts from zero
                estimator.load_sums(saved.sums)
        blocks = self.feed.blocks
        for block in range(begin, len(blocks)):
            for batch in self.feed.batches(blocks[block]):
                counts += estimator.update(batch)
            total = add_up_counts(self.accelerator, counts)
            self._check(total)
            self._record(convergence, estimator, total)
            done = sum(len(each) for each in blocks[: block + 1])
            self.progress.advance(group, index, done, convergence)
            if block + 1 < len(blocks) and self._is_time():
                self._save(estimator, Position(group, index, block + 1), counts, convergence)
        sums = estimator.sums()
        add_up(self.accelerator, sums)
        estimator.load_sums(sums)
        return add_up_counts(self.accelerator, counts), tuple(convergence.since_half())

    def _record(self, convergence: Convergence, estimator: Estimator, total: Counts) -> None:
        sample = convergence.sample(estimator.sums())
        add_up(self.accelerator, sample)
        if total.units > (convergence.records[-1][0] if convergence.records else 0):
            convergence.record(total.units, sample)

    def _check(self, total: Counts) -> None:
        looked_at = len(self.feed.order)
        if len(total.skipped) > self.max_skipped * looked_at:
            names = [self.feed.name(row) for row in sorted(total.skipped)]
            raise NonFiniteError(
                f"{listed(names, 5)}: gradients, inputs or logits are not finite; {len(names)} of {looked_at} rows "
                f"cannot be used, at most {self.max_skipped:.3g} of them may be (`max_skipped`); remove these rows, or "
                "load the model in a dtype with more range (`model.dtype`)"
            )

    def _is_time(self) -> bool:
        """Whether to save, decided by the leading process for all."""
        due = time.monotonic() - self._last_save >= SAVE_SECONDS
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([int(due)], device=self.accelerator.device)
            torch.distributed.broadcast(flag, src=0)
            due = bool(flag.item())
        return due

    def _save(self, estimator: Estimator, position: Position, counts: Counts, convergence: Convergence) -> None:
        save_pass(
            self.folder,
            self.accelerator,
            position,
            sums=estimator.sums(),
            counts=counts,
            convergence=convergence,
        )
        self._last_save = time.monotonic()
