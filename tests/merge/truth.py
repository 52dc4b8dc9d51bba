"""What a merge of files must give: the float64 oracles, applied tensor by tensor, and how close is close enough."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def oracle_of(method: str) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The oracle of a method; aliases are not known here."""
    return importlib.import_module(f"tests.oracles.{method}").oracle  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Truth:
    """Mean and precision of one tensor in float64."""

    mean: Tensor
    precision: Tensor


def merge_tensor(
    method: str,
    base: tuple[Tensor, Tensor | float],
    sources: Sequence[tuple[Tensor, Tensor | float]],
    weights: Sequence[float],
    *,
    floor: float | None = None,
) -> Truth:
    """One tensor merged by the oracle of `method`; base and sources are (mean, precision), weights effective ones."""
    shape = base[0].shape
    (mean, precision), *rest = [_flat(each, shape) for each in (base, *sources)]
    means, precisions = [each[0] for each in rest], [each[1] for each in rest]
    result = oracle_of(method)(mean, precision, means, precisions, list(weights), floor)
    merged = [torch.from_numpy(np.array(part, dtype=np.float64)).reshape(shape) for part in result]
    return Truth(*merged)


def _flat(posterior: tuple[Tensor, Tensor | float], shape: torch.Size) -> tuple[np.ndarray, np.ndarray]:
    mean, precision = (torch.as_tensor(part, dtype=torch.float64).expand(shape) for part in posterior)
    return mean.reshape(-1).numpy().copy(), precision.reshape(-1).numpy().copy()


def assert_one_rounding(
    seen: Tensor, wanted: Tensor, *, size: float = 4.0, compute: torch.dtype = torch.float32
) -> None:
    """`seen` is `wanted` rounded once to its dtype, give or take the rounding of the arithmetic.

    Args:
        seen: what was written.
        wanted: the float64 truth.
        size: magnitude of the numbers that were added up.
        compute: dtype of the arithmetic.
    """
    assert seen.shape == wanted.shape
    error = (seen.double() - wanted).abs()
    info = torch.finfo(seen.dtype)
    noise = 16 * EPS[compute] * max(size, float(wanted.abs().max()) if wanted.numel() else 0.0)
    # half a unit in the last place; below the smallest normal number the unit stays what it is there
    room = 0.5 * info.eps * wanted.abs().clamp(min=info.tiny) * (1 + 1e-6) + noise
    worst = float((error / room).max()) if wanted.numel() else 0.0
    assert worst <= 1.0, f"off by {worst:.3g} times the allowed error (largest {float(error.max()):.3g})"


def mismatch(merged: Tensor, source: Tensor, precision: Tensor | float, prior: Tensor | float) -> float:
    """Half the sum of (m - m_t)^2 (S_t - S_0), one entry at a time."""
    flat = [
        torch.as_tensor(each, dtype=torch.float64).expand(merged.shape).reshape(-1).tolist()
        for each in (merged, source, precision, prior)
    ]
    return 0.5 * sum((m - t) ** 2 * (S - S0) for m, t, S, S0 in zip(*flat, strict=True))


def lora_update(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The update s B A, entry by entry."""
    a, b = a.double(), b.double()
    rows = [sum(scaling * b[i, k] * a[k] for k in range(a.shape[0])) for i in range(b.shape[0])]
    return torch.stack([torch.as_tensor(row) for row in rows])


def lora_precision(a: Tensor, b: Tensor, precision_a: Tensor, precision_b: Tensor, scaling: float) -> Tensor:
    """Precision of every entry of dW = s B A for independent Gaussian factors: one over its variance.

    Var[dW_ij] = s^2 sum_k (B_ik^2 V_A,kj + A_kj^2 V_B,ik + V_B,ik V_A,kj)
    """
    a, b = a.double(), b.double()
    var_a, var_b = 1 / precision_a.double(), 1 / precision_b.double()
    result = torch.empty(b.shape[0], a.shape[1], dtype=torch.float64)
    for i, j in itertools.product(*map(range, result.shape)):
        terms = [
            b[i, k] ** 2 * var_a[k, j] + a[k, j] ** 2 * var_b[i, k] + var_b[i, k] * var_a[k, j]
            for k in range(a.shape[0])
        ]
        result[i, j] = 1 / (scaling**2 * sum(map(float, terms)))
    return result
