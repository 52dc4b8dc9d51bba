"""What a preview found, as a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np

from mergekit_bayes.preview.results import TIERS, Point, number

__all__ = ["points_table"]


def points_table(points: Sequence[Point], tasks: Sequence[str], sources: int) -> str:
    """Every point as a line of CSV, with a heading.

    Args:
        points: of all methods.
        tasks: their names.
        sources: weights per point.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    tiers = [tier for tier in TIERS if any(tier in point.gains for point in points)]
    head = ["method", *(f"weight_{index + 1}" for index in range(sources))]
    for tier in tiers:
        head += [
            *(f"{tier}_{task}" for task in tasks),
            *(f"{tier}_{task}_normalised" for task in tasks),
            f"{tier}_dominated",
        ]
    writer.writerow([*head, "seconds", "error"])
    for point in points:
        row: list[object] = [point.method, *point.mix]
        for tier in tiers:
            blank = np.full(len(tasks), np.nan)
            values = [*point.scores.get(tier, blank), *point.gains.get(tier, blank)]
            row += [number(value) if number(value) is not None else "" for value in values]
            row.append(point.dominated.get(tier, ""))
        writer.writerow([*row, "" if point.seconds is None else point.seconds, point.error or ""])
    return text.getvalue()
