"""What became of the rows of every data set: how many were read, left out, cut, and what there is to learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from mergekit_bayes.checkpoint.files import listed


@dataclass
class DatasetReport:
    """One data set.

    Attributes:
        name: as reports and held-out results call it.
        path: as in the recipe.
        role: `train` or `eval`.
        format: what its rows are.
        read: rows read.
        empty: rows left out because a text, completion, conversation, question or choice is empty.
        too_long: rows left out because they are longer than max_length.
        without_target: rows left out because nothing in them is predicted, often after a cut.
        held_out: rows of a training set that `eval_fraction` put aside.
        also_in_eval: training rows left out because they are held-out rows too.
        truncated: rows cut to max_length.
        cut_tokens: tokens lost by that.
        longest: tokens of the longest row, before it was cut.
        rows: rows that are used, packed where packing is on.
        segments: rows before packing.
        tokens: tokens in them.
        units: what is predicted in them: tokens, or one label per row for classification.
        share: share of the rows of an epoch.
        unused_columns: columns that are not looked at.
        notes: what people should know about it.
    """

    name: str
    path: str
    role: Literal["train", "eval"]
    format: str
    read: int = 0
    empty: int = 0
    too_long: int = 0
    without_target: int = 0
    held_out: int = 0
    also_in_eval: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    longest: int = 0
    rows: int = 0
    segments: int = 0
    tokens: int = 0
    units: int = 0
    share: float | None = None
    unused_columns: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def losses(self) -> str:
        """`3 empty, 2 longer than max_length`; empty where every row is used."""
        counts = {
            "empty": self.empty,
            "longer than max_length": self.too_long,
            "with nothing to predict": self.without_target,
            "also in the held-out data": self.also_in_eval,
            "held out": self.held_out,
        }
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)

    def lines(self) -> list[str]:
        """What there is to say about it, the first line for all, the others for what is out of the ordinary."""
        packed = f" from {self.segments:,}" if self.segments != self.rows else ""
        learned = "" if self.units == self.rows else f", {self.units:,} of {self.tokens:,} tokens learned"
        share = "" if self.share is None else f", {self.share:.1%} of an epoch"
        found = [f"{self.name} ({self.role}, {self.format}): {self.rows:,} rows{packed}{learned}{share}"]
        if self.losses:
            found.append(f"  of {self.read:,} rows read: {self.losses}")
        if self.truncated:
            lost = self.cut_tokens / (self.cut_tokens + self.tokens)
            found.append(f"  {self.truncated:,} rows cut to max_length, {self.cut_tokens:,} tokens ({lost:.1%}) lost")
        if self.unused_columns:
            found.append(f"  columns that are not read: {listed(self.unused_columns)}")
        return [*found, *(f"  {note}" for note in self.notes)]


@dataclass(frozen=True)
class DataReport:
    """All data sets of a run.

    Attributes:
        datasets: in the order of the recipe, training first; what `eval_fraction` holds out comes last.
        notes: what people should know about all of them.
    """

    datasets: tuple[DatasetReport, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report for people, line by line."""
        return [line for dataset in self.datasets for line in dataset.lines()] + list(self.notes)

    def plain(self) -> dict[str, object]:
        """The report as plain data, for logs."""
        return {"datasets": [_plain(dataset) for dataset in self.datasets], "notes": list(self.notes)}


def _plain(report: DatasetReport) -> Mapping[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(report).items()}
