"""IVON in float64 NumPy, line by line from the algorithm box of arXiv 2402.17641."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def ivon(  # one argument per symbol of the algorithm
    m: Array,
    gradient: Callable[[Array, int], Array],
    noise: Array,
    *,
    lr: float,
    ess: float,
    h0: float,
    beta1: float,
    beta2: float,
    delta: float,
    xi: float = np.inf,
    debias: bool = True,
    rescale: bool = True,
) -> tuple[Array, Array, Array]:
    """Run as many steps as there are samples in `noise` (steps, samples, *weight); returns (m, g, h)."""
    m = np.asarray(m, np.float64).copy()
    h, g = np.full_like(m, h0), np.zeros_like(m)
    alpha = lr * (h0 + delta) if rescale else lr
    for t, samples in enumerate(noise, start=1):
        sigma = 1 / np.sqrt(ess * (h + delta))
        g_hat, h_hat = np.zeros_like(m), np.zeros_like(m)
        for z in samples:
            theta = m + sigma * z
            at_sample = gradient(theta, t)
            g_hat += at_sample / len(samples)
            h_hat += at_sample * (theta - m) / sigma**2 / len(samples)
        g = beta1 * g + (1 - beta1) * g_hat
        h = beta2 * h + (1 - beta2) * h_hat + 0.5 * (1 - beta2) ** 2 * (h - h_hat) ** 2 / (h + delta)
        g_bar = g / (1 - beta1**t) if debias else g
        m -= alpha * np.clip((g_bar + delta * m) / (h + delta), -xi, xi)
    return m, g, h
