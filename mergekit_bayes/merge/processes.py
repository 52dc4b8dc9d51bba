"""Several processes on one merge: who am I, and waiting for the others.

Processes are started by `torchrun` or `accelerate launch`, which set RANK and WORLD_SIZE; they share the output's
file system and talk to each other only to wait and to hear of failures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mergekit_bayes.errors import PeerError


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
            dist.init_process_group("gloo")
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            # Who heard of another's failure has already taken part in the exchange that told of it.
            if not isinstance(failure, PeerError):
                self._agree(failure)
            if started:
                dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every process has got here.

        Raises:
            PeerError: another process failed instead.
        """
        if self.count > 1:
            self._agree(None)

    def _agree(self, failure: BaseException | None) -> None:
        import torch.distributed as dist

        messages: list[str | None] = [None] * self.count
        dist.all_gather_object(messages, None if failure is None else str(failure) or type(failure).__name__)
        failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
        if failed and failure is None:
            raise PeerError(f"process {failed[0][0]} of {self.count} failed: {failed[0][1]}")
