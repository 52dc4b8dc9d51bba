"""What a person sees of a run: a bar on a terminal, lines where there is none, and notes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress", "duration", "follow"]


class Progress:
    """Tells nobody anything; what a quiet run and all processes but one get."""

    def note(self, text: str) -> None:
        """Says something that stays on the screen."""

    def advance(self, step: int, row: Mapping[str, Any]) -> None:
        """Shows where the run is.

        Args:
            step: steps taken.
            row: newest values: loss, learning_rate, tokens_per_second, seconds_left.
        """

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Takes note of a row of the log."""


class _Lines(Progress):
    """One line per row of the log: for files and terminals without a cursor."""

    def __init__(self, total: int) -> None:
        self._total = total

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        print(f"step {step}/{self._total}  {describe_row(row)}", file=sys.stderr, flush=True)


class _Bar(Progress):
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int, row: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=step, text=describe_row(row))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        if "eval" in row:
            self.note(f"step {step}  {describe_row(row)}")


def describe_row(row: Mapping[str, Any]) -> str:
    """Returns loss, scores, learning rate, speed and remaining time for one line of a terminal."""
    parts = [f"loss {row['loss']:.4f}"] if isinstance(row.get("loss"), float) else []
    for name, scores in row.get("eval", {}).items():
        parts.append(f"{name}: " + ", ".join(f"{key} {scores[key]:.4g}" for key in scores if key != "units"))
    if isinstance(row.get("learning_rate"), float):
        parts.append(f"lr {row['learning_rate']:.3g}")
    if isinstance(row.get("tokens_per_second"), float):
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if isinstance(row.get("seconds_left"), float):
        parts.append(f"{duration(row['seconds_left'])} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Returns a time for people: `45 s`, `3:20 min`, `2:05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


@contextmanager
def follow(*, show: bool, done: int, total: int) -> Iterator[Progress]:
    """Shows a run on standard error while the block lasts.

    Args:
        show: whether to show anything.
        done: steps taken before.
        total: steps of the whole run.
    """
    if not show:
        yield Progress()
        return
    if not sys.stderr.isatty():
        yield _Lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Display
    from rich.table import Column

    # on a narrow terminal the bar gives way, not the numbers
    numbers = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True))
    columns = ("training", BarColumn(bar_width=None), MofNCompleteColumn(), numbers)
    with Display(*columns, console=Console(stderr=True), expand=True) as bar:
        yield _Bar(bar, bar.add_task("training", total=total, completed=done, text=""))
