"""The merged density of mixtures, and its peak by brute force: no responsibilities, no rule, only values of log q.

log q(w) = (1 - sum_t alpha_t) log q_0(w) + sum_t alpha_t T log sum_k pi_tk q_tk(w)^(1/T)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Component = tuple[float, np.ndarray, np.ndarray]
"""pi_k, mean and precisions, entry by entry."""


def oracle(
    base_mean: np.ndarray,
    base_precision: np.ndarray,
    means: Sequence[np.ndarray],
    precisions: Sequence[np.ndarray],
    weights: Sequence[float],
    floor: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and precision for tasks of one component, by one step of Newton's method on the log-density.

    Its slope and curvature are sums over the experts; a floor replaces the curvature.
    """
    experts = [(1 - sum(weights), base_mean, base_precision), *zip(weights, means, precisions, strict=True)]
    curvature = sum(share * precision for share, _, precision in experts)
    if floor is not None:
        curvature = np.maximum(curvature, floor)
    slope = sum(share * precision * (mean - base_mean) for share, mean, precision in experts)
    return base_mean + slope / curvature, curvature


def log_merged(
    x: np.ndarray,
    base: tuple[np.ndarray, np.ndarray],
    tasks: Sequence[Sequence[Component]],
    weights: Sequence[float],
    temperature: float,
) -> float:
    """The tempered log-density of the merge at x, up to the constant of the base."""
    value = (1 - sum(weights)) * -0.5 * np.sum(base[1] * (x - base[0]) ** 2)
    for weight, components in zip(weights, tasks, strict=True):
        terms = [
            np.log(pi) + 0.5 * np.sum(np.log(S / (2 * np.pi)) - S * (x - m) ** 2) / temperature
            for pi, m, S in components
        ]
        value += weight * temperature * np.logaddexp.reduce(terms)
    return float(value)


def climb(
    start: np.ndarray,
    base: tuple[np.ndarray, np.ndarray],
    tasks: Sequence[Sequence[Component]],
    weights: Sequence[float],
    temperature: float,
) -> np.ndarray:
    """A peak near `start`: entry after entry moved while that raises the density, with ever smaller steps."""
    x, step = start.astype(float).copy(), 0.5
    best = log_merged(x, base, tasks, weights, temperature)
    while step > 1e-9:
        moved = False
        for entry in np.ndindex(x.shape):
            for direction in (step, -step):
                trial = x.copy()
                trial[entry] += direction
                value = log_merged(trial, base, tasks, weights, temperature)
                if value > best:
                    x, best, moved = trial, value, True
                    break
        if not moved:
            step /= 2
    return x
