"""Which rows a pass looks at, and in which order.

The rows are the first of the order in which an epoch of training would see them, so that a mixture has its shares. They
are cut into blocks, after each of which a pass can be saved and says how it stands. Blocks do not depend on the number
of processes; within one, rows of similar length are put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mergekit_bayes.data import Rows, collate, deal, epoch_order

__all__ = ["Feed"]

_BLOCKS, _FEWEST = 25, 8  # points of the figure: so many, and not fewer for the sake of full batches


@dataclass(frozen=True)
class Feed:
    """Deals rows to one of several processes.

    Attributes:
        rows: all rows there are.
        num_examples: how many are looked at, at most.
        batch_size: rows that a process looks at together.
        pad_token_id: fills up short rows.
        seed: of the order.
        rank: this process.
        world: number of processes.
        device: where batches go.
    """

    rows: Rows
    num_examples: int
    batch_size: int
    pad_token_id: int
    seed: int
    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"

    @property
    def order(self) -> list[int]:
        """Indices of the rows that are looked at."""
        return epoch_order(self.rows, seed=self.seed, epoch=0)[: self.num_examples]

    @property
    def blocks(self) -> list[list[int]]:
        """The same, in blocks."""
        order = self.order
        size = max(math.ceil(len(order) / _BLOCKS), min(self.batch_size, math.ceil(len(order) / _FEWEST)))
        return [order[start : start + size] for start in range(0, len(order), size)]

    @property
    def units(self) -> int:
        """Training units of the rows that are looked at."""
        return self.rows.num_units_of(self.order)

    @property
    def tokens(self) -> int:
        """Tokens of the rows that are looked at."""
        return int(self.rows.lengths[self.order].sum())

    def batches(self, block: list[int]) -> Iterator[dict[str, Any]]:
        """Yields this process's batches of a block, with the number of each row under `row`."""
        chosen = np.array(block, dtype=np.int64)
        for indices in deal(self.rows, chosen, batch_size=self.batch_size, rank=self.rank, world=self.world):
            if indices:
                batch = collate(
                    [self.rows[index] for index in indices], pad_token_id=self.pad_token_id, task=self.rows.task
                )
                batch["row"] = torch.tensor(indices, dtype=torch.int64)
                yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def name(self, row: int) -> str:
        """Returns a row as people find it: its number within its data set, counted from 1."""
        part = next(part for part in self.rows.parts if part.start <= row < part.stop)
        return f"row {row - part.start + 1}" + (f" of {part.name}" if part.name else "")
