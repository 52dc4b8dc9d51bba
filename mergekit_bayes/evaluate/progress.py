"""What a person sees of an evaluation: a bar on a terminal, a line for each model where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["follow"]

Advance = Callable[[str, int], None]
"""Told which model is looked at, and how many rows that made."""


@contextmanager
def follow(*, show: bool, rows: int) -> Iterator[Advance]:
    """Shows progress on standard error while the block lasts.

    Args:
        show: whether to show anything.
        rows: of all models together.
    """
    if not show:
        yield lambda _title, _rows: None
    elif sys.stderr.isatty():
        yield from _bar(rows)
    else:
        yield _lines(rows)


def _lines(total: int) -> Advance:
    """One line whenever another model begins: for files and terminals without a cursor."""
    done, last = 0, ""

    def advance(title: str, rows: int) -> None:
        nonlocal done, last
        if title != last:
            print(f"{title}: from row {done} of {total}", file=sys.stderr, flush=True)
        done, last = done + rows, title

    return advance


def _bar(total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    # on a narrow terminal the bar gives way, not the numbers
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), expand=True, transient=True) as display:
        task = display.add_task("rows", total=total)
        yield lambda title, rows: display.update(task, description=title.replace("[", "\\["), advance=rows)
