"""The mismatch against brute force; `test_conjugate.py` shows that it is exact for quadratic losses."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_bayes.errors import ShapeMismatchError
from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior, mismatch


def _draw(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Diagonal, Diagonal]:
    generator = torch.Generator().manual_seed(seed)
    merged, here, there, prior, learned = (
        torch.randn(4, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)
    )
    base = Diagonal(there, prior.exp())
    return merged, Diagonal(here, base.precision + learned.exp()), base


@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("source_family", ["isotropic", "diagonal"])
@pytest.mark.parametrize("base_family", ["isotropic", "diagonal"])
def test_brute_force(base_family: str, source_family: str, dtype: torch.dtype, room: float) -> None:
    merged, diagonal_source, diagonal_base = _draw(0, dtype)
    source: Posterior = diagonal_source
    base: Posterior = diagonal_base
    if source_family == "isotropic":
        source = Isotropic(source.mean, 3.0)
    if base_family == "isotropic":
        base = Isotropic(base.mean, 0.5)
    terms = [
        0.5 * (float(m) - float(m_t)) ** 2 * (float(s_t) - float(s_0))
        for m, m_t, s_t, s_0 in zip(
            merged.flatten(),
            source.mean.flatten(),
            source.precision_tensor().expand(4, 6).flatten(),
            base.precision_tensor().expand(4, 6).flatten(),
            strict=True,
        )
    ]
    seen = mismatch(merged, source, base)
    assert seen.shape == ()
    assert seen.dtype == dtype
    assert seen.item() == pytest.approx(math.fsum(terms), rel=room)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "hessian_weighted", "gradient_matching", "posterior"])
def test_a_source_merged_alone_at_weight_one_loses_nothing(method: str) -> None:
    _, source, base = _draw(1)
    merged = get_method(method).kernel(base, [source], torch.ones(1, dtype=torch.float64))
    assert mismatch(merged.mean, source, base).item() < 1e-28
    assert mismatch(source.mean, source, base).item() == 0


def test_a_source_that_learned_nothing_loses_nothing() -> None:
    merged, source, base = _draw(2)
    assert mismatch(merged, source, Isotropic(base.mean, 0.5)).item() > 0
    assert mismatch(merged, Diagonal(source.mean, base.precision), base).item() == 0


def test_inputs_are_not_changed() -> None:
    merged, source, base = _draw(3)
    tensors = (merged, source.mean, source.precision, base.mean, base.precision)
    before = [each.clone() for each in tensors]
    mismatch(merged, source, base)
    assert all(torch.equal(each, old) for each, old in zip(tensors, before, strict=True))


def test_nothing_is_broadcast() -> None:
    merged, source, base = _draw(4)
    with pytest.raises(ShapeMismatchError, match=r"shape \(6,\), source of \(4, 6\)"):
        mismatch(merged[0], source, base)
