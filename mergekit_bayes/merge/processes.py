"""Several processes on one merge: who am I, and waiting for the others.

Processes are started by `torchrun` or `accelerate launch`, which set RANK and WORLD_SIZE; they share the output's
file system and talk to each other to wait, to hear of failures, and to exchange what they have found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from mergekit_bayes.errors import PeerError

T = TypeVar("T")

_PATIENCE = timedelta(days=30)


@dataclass
class Processes:
    """The processes of one merge.

    Attributes:
        rank: which one this is.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """Read what the launcher set; one process if there was no launcher."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def leader(self) -> bool:
        """Whether this process prepares and publishes the output."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Connect to the other processes for the duration of the merge; leave together, failures included."""
        if self.count == 1:
            yield
            return
        import torch.distributed as dist

        started = not dist.is_initialized()
        if started:
            # one may wait for hours for what another is at; of one that dies all hear at once: its connection closes
            dist.init_process_group("gloo", timeout=_PATIENCE)
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            # Who heard of another's failure has already taken part in the exchange that told of it.
            if not isinstance(failure, PeerError):
                self._exchanged(failure, None)
            if started:
                dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every process has got here.

        Raises:
            PeerError: another process failed instead.
        """
        self.gathered(None)

    def gathered(self, value: T) -> list[T]:
        """What every process has, by rank; every process calls this at the same place.

        Args:
            value: of this process, anything that can be pickled.

        Raises:
            PeerError: another process failed instead.
        """
        return [value] if self.count == 1 else self._exchanged(None, value)

    def _exchanged(self, failure: BaseException | None, value: Any) -> list[Any]:
        """What every process has, with word of those that failed."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, (None if failure is None else str(failure) or type(failure).__name__, value))
        except RuntimeError as error:
            if failure is not None:
                return []  # what failed here matters more
            lines = str(error).splitlines() or [type(error).__name__]
            raise PeerError(f"process {self.rank} of {self.count}: another process is gone: {lines[0]}") from error
        failed = [(rank, text) for rank, (text, _) in enumerate(found) if text is not None]
        if failed and failure is None:
            raise PeerError(f"process {failed[0][0]} of {self.count} failed: {failed[0][1]}")
        return [value for _, value in found]
