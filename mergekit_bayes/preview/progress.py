"""What a person sees of a sweep: a bar with the time that is left, or now and then a line where no terminal is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["follow"]

_EVERY = 10.0  # seconds between lines


@contextmanager
def follow(total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Shows a sweep on standard error while the block lasts.

    Args:
        total: number of mixes.
        show: whether to show anything.

    Yields:
        What is told the number of mixes after every group.
    """
    if not show:
        yield lambda _: None
    elif not sys.stderr.isatty():
        yield _Lines(total)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("evaluating mixes", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("mixes", total=total)
            yield lambda count: bar.advance(task, count)


class _Lines:
    """One line every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._began = self._said = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said < _EVERY and self._done < self._total:
            return
        self._said = now
        left = (now - self._began) / self._done * (self._total - self._done)
        print(f"mix {self._done}/{self._total}  about {left:.0f} s left", file=sys.stderr, flush=True)
