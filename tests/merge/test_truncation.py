"""Truncations against the singular value decomposition of the dense update."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.merge import truncation
from mergekit_bayes.merge.lora import Factors


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 99])
def test_truncated_factors_are_the_best_low_rank_approximation(rank: int) -> None:
    g = torch.Generator().manual_seed(8)
    f = Factors(torch.randn(6, 9, generator=g).double(), torch.randn(7, 6, generator=g).double())
    kept = truncation.truncate_factors(f, rank)
    u, sigma, vh = torch.linalg.svd(f.b @ f.a, full_matrices=False)
    keep = min(rank, 6)
    torch.testing.assert_close(kept.b @ kept.a, (u[:, :keep] * sigma[:keep]) @ vh[:keep], rtol=1e-10, atol=1e-10)
    lost = 1 - float(sigma[:keep].square().sum() / sigma.square().sum())
    assert kept.lost_energy == pytest.approx(lost, abs=1e-12)


@pytest.mark.parametrize("exact_side", [1024, 4])
def test_a_dense_update_is_truncated_to_what_svd_keeps(exact_side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "EXACT_SVD_SIDE", exact_side)
    g = torch.Generator().manual_seed(9)
    left, _ = torch.linalg.qr(torch.randn(60, 40, generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64))
    sigma = 2.0 ** -torch.arange(40, dtype=torch.float64)
    update = (left * sigma) @ right.T
    kept = truncation.truncate_dense(update, 5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(kept.b @ kept.a, (left[:, :5] * sigma[:5]) @ right.T[:5], rtol=0, atol=1e-9)
    assert kept.lost_energy == pytest.approx(1 - float(sigma[:5].square().sum() / sigma.square().sum()), rel=1e-6)


def test_the_lost_energy_of_the_randomised_truncation_is_that_of_its_own_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(truncation, "EXACT_SVD_SIDE", 4)
    update = torch.randn(50, 30, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    kept = truncation.truncate_dense(update, 6, torch.Generator().manual_seed(1))
    residual = torch.linalg.norm(update - kept.b @ kept.a) ** 2 / torch.linalg.norm(update) ** 2
    assert kept.lost_energy == pytest.approx(float(residual), rel=1e-6)
    again = truncation.truncate_dense(update, 6, torch.Generator().manual_seed(1))
    assert torch.equal(kept.a, again.a)


def test_nothing_is_lost_of_nothing() -> None:
    zero = torch.zeros(5, 6)
    assert truncation.truncate_dense(zero, 2, torch.Generator()).lost_energy == 0.0
    assert truncation.truncate_factors(Factors(torch.zeros(2, 6), torch.zeros(5, 2)), 1).lost_energy == 0.0
