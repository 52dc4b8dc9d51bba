"""Rows made from their lengths, for what does not look at their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergekit_bayes.data.rows import Encoded, Rows, mixture


def encoded(*lengths: int, start: int = 0) -> list[Encoded]:
    """Rows of these lengths; every token differs, and all but the first are learned."""
    rows = []
    for length in lengths:
        tokens = np.arange(start, start + length, dtype=np.int32)
        rows.append(Encoded(tokens, np.arange(length) > 0))
        start += length
    return rows


def examples(*classes: int) -> Rows:
    """Rows of one token for a classifier."""
    return Rows(
        [Encoded(np.array([i], np.int32), label=c) for i, c in enumerate(classes)], task="sequence_classification"
    )


def rows_of(*lengths: int) -> Rows:
    return Rows(encoded(*lengths), task="causal_lm")


def mixed(sizes: Sequence[int], weights: Sequence[float | None]) -> Rows:
    """A mixture of data sets of so many rows."""
    parts = [
        (f"set{i}", encoded(*[2] * size), weight) for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    return mixture(parts, task="causal_lm")
