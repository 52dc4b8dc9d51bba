"""TIES (arXiv 2306.01708) entry by entry in plain loops: rank the magnitudes, count the votes, average the winners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def oracle(
    base_mean: np.ndarray,
    base_precision: np.ndarray,
    means: Sequence[np.ndarray],
    precisions: Sequence[np.ndarray],
    weights: Sequence[float],
    floor: float | None = None,
    *,
    density: Sequence[float] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision in float64; arrays of any shape."""
    shares = [1.0] * len(means) if density is None else density
    trimmed = [_trimmed((mean - base_mean).ravel(), share) for mean, share in zip(means, shares, strict=True)]
    merged = np.array([_entry(votes, weights, normalize) for votes in zip(*trimmed, strict=True)])
    return base_mean + scale * merged.reshape(base_mean.shape), base_precision


def _trimmed(values: np.ndarray, share: float) -> list[float]:
    count = len(values) if share >= 1 else max(1, int(share * len(values))) if share > 0 else 0
    ranked = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))
    kept = set(ranked[:count])
    return [float(value) if index in kept else 0.0 for index, value in enumerate(values)]


def _entry(votes: Sequence[float], weights: Sequence[float], normalize: bool) -> float:
    ballots = [(weight * vote, weight) for vote, weight in zip(votes, weights, strict=True)]
    positive = sum(ballot for ballot, _ in ballots) >= 0
    winners = [(ballot, weight) for ballot, weight in ballots if (ballot > 0 if positive else ballot < 0)]
    total = sum(ballot for ballot, _ in winners)
    divisor = sum(weight for _, weight in winners)
    return total / divisor if normalize and divisor != 0 else total
