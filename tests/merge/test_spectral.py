"""Spectra hold the directions a matrix has and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_bayes.merge.spectral import average, isometry, joined, shared_basis, size_of, spectrum, task_matrices
from mergekit_bayes.posterior import Isotropic


def _normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 30), (30, 40, 3), (64, 64, 7), (9, 5, 0)])
def test_the_rank_is_that_of_the_matrix(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    matrix = _normal(1, rows, rank, dtype=dtype) @ _normal(2, rank, columns, dtype=dtype)
    parts = spectrum(matrix)
    assert parts.sigma.shape == (rank,)
    torch.testing.assert_close((parts.u * parts.sigma) @ parts.v.T, matrix, rtol=0, atol=2e-4 if rank else 0)


def test_what_cancels_has_no_direction() -> None:
    matrix = _normal(3, 20, 20, dtype=torch.float32)
    left = 0.3 * matrix - (0.1 * matrix + 0.2 * matrix)
    assert left.any(), "rounding is left"
    assert spectrum(left).sigma.numel() > 0
    assert spectrum(left, size_of([0.3 * matrix], torch.zeros_like(matrix))).sigma.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e-1, 1e-3])
def test_an_update_of_a_checkpoint_has_the_rank_it_was_made_with(dtype: torch.dtype, ratio: float) -> None:
    """Rounding of the base's weights is left in every direction of the difference."""
    base, update = _normal(13, 128, 96, dtype=dtype), _normal(14, 128, 4, dtype=dtype) @ _normal(15, 4, 96, dtype=dtype)
    task = (base + ratio * update) - base
    assert spectrum(task, size_of([task], base)).sigma.numel() == 4


def test_the_nearest_isometry() -> None:
    """Better than every other one that was tried, and equal to X (X^T X)^(-1/2)."""
    vectors = _normal(4, 12, 5)
    nearest = isometry(vectors)
    torch.testing.assert_close(nearest.T @ nearest, torch.eye(5, dtype=torch.float64))
    values, basis = torch.linalg.eigh(vectors.T @ vectors)
    torch.testing.assert_close(nearest, vectors @ (basis / values.sqrt()) @ basis.T)
    distance = torch.linalg.norm(nearest - vectors)
    for seed in range(20):
        other = torch.linalg.qr(nearest + 0.1 * _normal(seed, 12, 5)).Q
        assert torch.linalg.norm(other - vectors) > distance


def test_the_isometry_of_columns_said_twice_shares_them() -> None:
    once = torch.linalg.qr(_normal(5, 10, 3)).Q
    twice = isometry(torch.cat([once, once], dim=1))
    torch.testing.assert_close(twice, torch.cat([once, once], dim=1) / 2**0.5)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 2)])
def test_a_basis_for_all(shape: tuple[int, int]) -> None:
    matrices = [_normal(seed, *shape) for seed in (6, 7)]
    basis = shared_basis(matrices, 0.0)
    rank = min(shape[0], 2 * shape[1])
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    side_by_side = torch.cat(matrices, dim=1)
    torch.testing.assert_close(basis @ (basis.T @ side_by_side), side_by_side)
    gram = basis.T @ side_by_side @ side_by_side.T @ basis
    torch.testing.assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-10)


def test_parts_stand_side_by_side() -> None:
    first, second = spectrum(_normal(8, 6, 5)).top(2), spectrum(_normal(9, 6, 5)).top(1)
    both = joined([first, second])
    assert (both.u.shape, both.sigma.shape, both.v.shape) == ((6, 3), (3,), (5, 3))
    wanted = (first.u * first.sigma) @ first.v.T + (second.u * second.sigma) @ second.v.T
    torch.testing.assert_close((both.u * both.sigma) @ both.v.T, wanted)


def test_task_matrices_and_their_average() -> None:
    base = Isotropic(_normal(10, 3, 2), 1.0)
    tasks = [_normal(11, 3, 2), torch.zeros(3, 2, dtype=torch.float64), _normal(12, 3, 2)]
    sources = [base.with_mean(base.mean + task) for task in tasks]
    weights = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    (only,) = task_matrices(base, sources, weights)
    torch.testing.assert_close(only, 2 * tasks[0])
    torch.testing.assert_close(average(base, sources, weights, 0.5), base.mean + 0.5 * tasks[0])
