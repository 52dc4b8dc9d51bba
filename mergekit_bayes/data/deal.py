"""Dealing rows to processes and micro-batches.

One optimizer step learns from the next `batch_size * world * accumulation` rows of the epoch's order, whoever
computes their gradients: one process with 4 rows, two with 2, and one that accumulates 2 times 2 take the same
steps. Within a step, rows of similar length are put together, so that little is spent on padding.

The last step of an epoch has fewer rows when they do not divide evenly. It has as few micro-batches as hold its rows,
the same number on every process, and some may be empty: `collate` makes a batch without targets of an empty one, whose
loss is zero and whose collective operations still meet those of the other processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mergekit_bayes.data.order import epoch_order
from mergekit_bayes.data.rows import Integers, Rows


def batches(
    rows: Rows, *, seed: int, epoch: int, batch_size: int, rank: int = 0, world: int = 1, accumulation: int = 1
) -> Iterator[tuple[list[list[int]], int]]:
    """The optimizer steps of one epoch, as one process sees them.

    Args:
        rows: the training rows.
        seed: of the order, see `epoch_order`.
        epoch: counted from 0.
        batch_size: rows per micro-batch.
        rank: which process.
        world: number of processes.
        accumulation: micro-batches per step and process.

    Yields:
        For each step this process's micro-batches, each a list of indices into `rows`, and the training units of the
        whole step over all processes: what a summed loss is divided by.
    """
    order = np.array(epoch_order(rows, seed=seed, epoch=epoch), dtype=np.int64)
    size = batch_size * world * accumulation
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield deal(rows, chosen, batch_size=batch_size, rank=rank, world=world), int(rows.units[chosen].sum())


def steps_per_epoch(rows: Rows, *, batch_size: int, world: int = 1, accumulation: int = 1) -> int:
    """Optimizer steps in one epoch, the last one possibly of fewer rows."""
    return math.ceil(len(rows) / (batch_size * world * accumulation))


def evaluation_batches(rows: Rows, *, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
    """Every row once over all processes, long rows first; every process gets the same number of batches.

    Args:
        rows: the rows to evaluate.
        batch_size: rows per batch.
        rank: which process.
        world: number of processes.

    Yields:
        Indices into `rows`; the last batches may be shorter or empty.
    """
    everything = np.arange(len(rows), dtype=np.int64)
    yield from deal(rows, everything, batch_size=batch_size, rank=rank, world=world)


def deal(rows: Rows, chosen: Integers, *, batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This process's micro-batches of some rows: as few as hold them, as even as they can be, long rows first.

    Args:
        rows: all rows.
        chosen: indices of those that are dealt out.
        batch_size: rows per micro-batch.
        rank: which process.
        world: number of processes.

    Returns:
        Indices into `rows`; as many lists on every process, some of which may be empty.
    """
    ordered = chosen[np.argsort(-rows.lengths[chosen], kind="stable")]
    count = math.ceil(len(ordered) / (batch_size * world))
    slots = np.array_split(ordered, count * world)  # the first ones are longer by one row at most
    return [slots[index * world + rank].tolist() for index in range(count)]
