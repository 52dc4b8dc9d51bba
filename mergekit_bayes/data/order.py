"""In which order rows are seen: one permutation per (seed, epoch), whatever the machine and the number of processes.

Without weights, an epoch is every row once. With weights, an epoch has as many rows as there are, of which each
data set gives its share: it deals out its own rows in one random order after another, going on where the last epoch
stopped, so that none comes a second time before all have come once.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from mergekit_bayes.data.rows import Integers, Part, Rows

_EPOCH, _PASS = 0, 1  # what a stream of random numbers is for


def epoch_order(rows: Rows, *, seed: int, epoch: int) -> list[int]:
    """The rows of one epoch, in the order in which they are learned from.

    Args:
        rows: the training rows.
        seed: names the orders; any integer >= 0.
        epoch: counted from 0.

    Returns:
        Indices into `rows`, as many as there are rows.
    """
    chosen = np.concatenate([_drawn(rows, index, seed=seed, epoch=epoch) for index in range(len(rows.parts))])
    order: list[int] = chosen[_permutation(len(chosen), seed, _EPOCH, epoch)].tolist()
    return order


def epoch_shares(rows: Rows) -> tuple[int, ...]:
    """How many rows of an epoch come from each part.

    Proportional to the weights, rounded so that they add up to the number of rows: down, and the rest to the largest
    remainders. Without weights, the number of rows each has.
    """
    return _shares(rows.parts, len(rows))


@functools.lru_cache(maxsize=64)
def _shares(parts: tuple[Part, ...], total: int) -> tuple[int, ...]:
    if any(part.weight is None for part in parts):
        return tuple(len(part) for part in parts)
    # an empty data set has nothing to give, whatever its weight
    weights = [part.weight if part.weight is not None and len(part) else 0.0 for part in parts]
    exact = [total * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    order = sorted(range(len(parts)), key=lambda index: (shares[index] - exact[index], index))
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return tuple(shares)


def _drawn(rows: Rows, index: int, *, seed: int, epoch: int) -> Integers:
    """What part `index` gives to an epoch: a stretch of its passes, one random order of its rows after another."""
    part, share = rows.parts[index], epoch_shares(rows)[index]
    if part.weight is None:
        return np.arange(part.start, part.stop, dtype=np.int64)
    drawn: list[Integers] = [np.zeros(0, np.int64)]
    position, end = epoch * share, (epoch + 1) * share
    while position < end:
        number, offset = divmod(position, len(part))
        taken = min(end - position, len(part) - offset)
        order = _permutation(len(part), seed, _PASS, index, number)
        drawn.append(part.start + order[offset : offset + taken])
        position += taken
    return np.concatenate(drawn)


def _permutation(length: int, *key: int) -> Integers:
    # from the bits of PCG64, which NumPy keeps stable over its versions; it does not promise that for `permutation`
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    order: Integers = np.argsort(bits, kind="stable").astype(np.int64)
    return order
