"""Experiment trackers, through Accelerate: a name that cannot be served is an error, not a shrug."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.logbook import flat

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Trackers", "check_trackers"]

PROJECT = "mergekit_bayes"


def check_trackers(names: Sequence[str]) -> None:
    """Makes sure that every tracker is installed, which Accelerate itself passes over in silence.

    Raises:
        FinetuneError: with all that are missing.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        have = f"installed are {', '.join(sorted(available)) or 'none'}"
        raise FinetuneError(f"training.report_to: no tracker {', '.join(missing)} here; {have}: install its package")


class Trackers:
    """Sends rows of the log to the trackers of an accelerator, by the main process.

    Args:
        accelerator: made with `log_with`.
        names: of the trackers; without any, nothing happens.
    """

    def __init__(self, accelerator: Accelerator, names: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._names = tuple(names)

    def start(self, config: Mapping[str, object], rows: Sequence[Mapping[str, Any]]) -> None:
        """Opens the trackers.

        Args:
            config: the recipe, as flat as trackers want it.
            rows: of the log so far, where a run goes on: they are told again.
        """
        if self._names:
            self._accelerator.init_trackers(PROJECT, config=_config(config))
            for row in rows:
                self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """Passes one row on, under its step."""
        if self._names:
            values = {key: value for key, value in flat(row).items() if key != "step"}
            self._accelerator.log(values, step=int(row["step"]))

    def finish(self) -> None:
        """Closes the trackers."""
        if self._names:
            # not `end_training`, which would end the processes' connection too
            for tracker in self._accelerator.trackers:
                tracker.finish()


def _config(tree: Mapping[str, object], path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in tree.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            found.update(_config(value, key))
        else:
            found[key] = value if isinstance(value, int | float | str | bool) else str(value)
    return found
