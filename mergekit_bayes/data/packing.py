"""Filling rows of `max_length` tokens, so that little is spent on padding.

Prompts with completions and conversations are put behind one another whole, and do not see each other: the loss is
exactly that of the rows on their own. Which rows share one is chosen by best fit, longest first, which leaves little
room and depends on nothing but the lengths. Plain texts are joined into one stream and cut into windows; every token
but the first of a window is predicted, also from the text before its own.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from mergekit_bayes.data.rows import Encoded


def pack(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Rows of several segments, none longer than `max_length`.

    Args:
        rows: rows of a language model, each at most `max_length` tokens.
        max_length: tokens per packed row.

    Returns:
        The packed rows, in the order of their longest segments.
    """
    return [
        _together([rows[index] for index in group]) for group in best_fit([len(r.tokens) for r in rows], max_length)
    ]


def windows(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """The tokens of all rows, in order, in windows of `max_length`; the last one may be shorter.

    Args:
        rows: rows of a language model, of any length.
        max_length: tokens per window.
    """
    if not rows:
        return []
    tokens = np.concatenate([row.tokens for row in rows])
    starts = range(0, len(tokens), max_length)
    pieces = [tokens[start : start + max_length] for start in starts]
    # a last window of one token would predict nothing
    return [Encoded(piece, np.arange(len(piece)) > 0) for piece in pieces if len(piece) > 1]


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bin packing by best fit decreasing: each item, longest first, goes where it leaves the least room.

    Args:
        sizes: none larger than `capacity`.
        capacity: of a bin.

    Returns:
        The indices in each bin.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # how much room open bins have, each value once, ascending
    open_bins: dict[int, list[int]] = {}  # room -> bins with that much
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        assert size <= capacity
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            number = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        bins[number].append(index)
        left = room - size
        if left not in open_bins:
            bisect.insort(rooms, left)
        open_bins.setdefault(left, []).append(number)
    return bins


def _together(rows: Sequence[Encoded]) -> Encoded:
    marks = [row.targets for row in rows if row.targets is not None]
    assert len(marks) == len(rows), "only rows of a language model can be packed"
    return Encoded(
        tokens=np.concatenate([row.tokens for row in rows]),
        targets=np.concatenate(marks),
        segments=tuple(len(row.tokens) for row in rows),
    )
