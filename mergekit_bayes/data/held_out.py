"""Held-out rows, and that nothing of them is learned.

Which rows `eval_fraction` holds out is decided by their content alone: neither the seed nor the order of a file changes
it, so models of several seeds can be compared and merged on the same held-out rows, and equal rows go the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mergekit_bayes.data.encode import EncodedSet
from mergekit_bayes.errors import DataError


def hold_out(sets: Sequence[EncodedSet], fraction: float) -> tuple[list[EncodedSet], list[EncodedSet]]:
    """Takes a share out of every training set.

    Args:
        sets: the training sets.
        fraction: share of the different rows of each that is held out, at least one and not all.

    Returns:
        What is left of the training sets, and the held-out sets, one for each.

    Raises:
        DataError: a set has no two different rows.
    """
    pairs = [_parted(entry, fraction) for entry in sets]
    return [left for left, _ in pairs], [held for _, held in pairs]


def without_held_out(sets: Sequence[EncodedSet], held: Sequence[EncodedSet]) -> list[EncodedSet]:
    """The training sets without the rows that any held-out set has too.

    Raises:
        DataError: nothing is left of one.
    """
    known = {row.key for entry in held for row in entry.rows}
    found = []
    for entry in sets:
        kept = _where(entry, [row.key not in known for row in entry.rows])
        entry.report.also_in_eval += len(entry.rows) - len(kept.rows)
        if not kept.rows:
            raise DataError(
                f"{entry.report.path}: none of its {entry.report.read:,} rows is left: {entry.report.losses}"
            )
        found.append(kept)
    return found


def _parted(entry: EncodedSet, fraction: float) -> tuple[EncodedSet, EncodedSet]:
    keys = sorted({row.key for row in entry.rows})  # of digests: an order as good as a random one
    if len(keys) < 2:
        seen = f"{entry.report.path}: has no two different rows"
        raise DataError(f"{seen}, of which `data.eval_fraction` could hold one out; expected more rows, or `data.eval`")
    count = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    chosen = set(keys[:count])
    held = _where(entry, [row.key in chosen for row in entry.rows])
    left = _where(entry, [row.key not in chosen for row in entry.rows])
    entry.report.held_out = len(held.rows)
    report = dataclasses.replace(
        entry.report, role="eval", read=len(held.rows), empty=0, too_long=0, without_target=0, held_out=0, notes=[]
    )
    return left, dataclasses.replace(held, report=dataclasses.replace(report, truncated=0, cut_tokens=0))


def _where(entry: EncodedSet, kept: Sequence[bool]) -> EncodedSet:
    rows = [row for row, keep in zip(entry.rows, kept, strict=True) if keep]
    label_of = [name for name, keep in zip(entry.label_of, kept, strict=False) if keep]
    return dataclasses.replace(entry, rows=rows, label_of=label_of)
