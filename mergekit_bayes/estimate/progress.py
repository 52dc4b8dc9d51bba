"""What a person sees of a pass: a bar on a terminal, lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergekit_bayes.precision.convergence import Convergence

__all__ = ["Progress", "follow"]


class Progress:
    """Tells nobody anything; what a quiet run and all processes but one get."""

    def advance(self, group: int, index: int, rows: int, convergence: Convergence) -> None:
        """Shows where the run is.

        Args:
            group: of targets, counted from 0.
            index: pass over the rows for this group, counted from 0.
            rows: looked at in this pass.
            convergence: of this pass.
        """


class _Lines(Progress):
    """One line per block: for files and terminals without a cursor."""

    def __init__(self, rows: int, groups: int) -> None:
        self._rows, self._groups = rows, groups

    def advance(self, group: int, index: int, rows: int, convergence: Convergence) -> None:
        where = f"group {group + 1}/{self._groups}, " if self._groups > 1 else ""
        again = f"pass {index + 1}, " if index else ""
        text = f"{where}{again}row {rows}/{self._rows}  {_moved(convergence)}"
        print(text.rstrip(), file=sys.stderr, flush=True)


class _Bar(Progress):
    def __init__(self, display: Any, rows: int, groups: int) -> None:
        self._display, self._rows, self._groups = display, rows, groups
        self._tasks: dict[tuple[int, int], Any] = {}

    def advance(self, group: int, index: int, rows: int, convergence: Convergence) -> None:
        key = (group, index)
        if key not in self._tasks:
            again = f", pass {index + 1}" if index else ""
            name = f"group {group + 1} of {self._groups}{again}" if self._groups > 1 else f"rows{again}"
            self._tasks[key] = self._display.add_task(name, total=self._rows, text="")
        self._display.update(self._tasks[key], completed=rows, text=_moved(convergence))


def _moved(convergence: Convergence) -> str:
    changes = convergence.since_half()
    return f"moves by {changes[-1].median:.1%}" if changes else ""


@contextmanager
def follow(*, show: bool, rows: int, groups: int) -> Iterator[Progress]:
    """Shows a run on standard error while the block lasts.

    Args:
        show: whether to show anything.
        rows: of one pass.
        groups: of targets.
    """
    if not show:
        yield Progress()
        return
    if not sys.stderr.isatty():
        yield _Lines(rows, groups)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display
    from rich.table import Column

    # on a narrow terminal the bar gives way, not the numbers
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
    )
    with Display(*columns, console=Console(stderr=True), expand=True) as display:
        yield _Bar(display, rows, groups)


def _speed() -> Any:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.1f} rows/s" if task.speed else "")

    return Speed()
