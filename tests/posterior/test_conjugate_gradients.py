"""The solver on dense matrices, where the answer is known."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.errors import NonFiniteError, NonPositivePrecisionError
from mergekit_bayes.posterior.conjugate_gradients import conjugate_gradients


def _system(seed: int, size: int = 30, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
    return matrix.to(dtype), torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def test_it_solves_to_the_tolerance_and_reports_the_true_residual() -> None:
    matrix, b = _system(0)
    diagonal = matrix.diagonal()
    for tolerance in (1e-2, 1e-6, 1e-12):
        solution = conjugate_gradients(matrix.mv, b, lambda r: r / diagonal, tolerance=tolerance, max_iterations=500)
        left = b - matrix @ solution.x
        residual = ((left**2 / diagonal).sum() / (b**2 / diagonal).sum()).sqrt().item()
        assert solution.converged
        assert solution.residual == pytest.approx(residual, rel=1e-6)
        assert residual <= tolerance
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrix, b), rtol=1e-8, atol=1e-8)


def test_a_diagonal_system_takes_one_step() -> None:
    diagonal = torch.linspace(1, 1e6, 20, dtype=torch.float64)
    solution = conjugate_gradients(
        diagonal.mul, torch.ones_like(diagonal), lambda r: r / diagonal, tolerance=1e-12, max_iterations=9
    )
    assert solution.iterations == 1
    torch.testing.assert_close(solution.x, 1 / diagonal)


def test_zero_needs_no_step_and_too_few_steps_are_no_error() -> None:
    matrix, b = _system(1)
    assert (
        conjugate_gradients(
            matrix.mv, b * 0, lambda r: r / matrix.diagonal(), tolerance=1e-6, max_iterations=5
        ).iterations
        == 0
    )
    short = conjugate_gradients(matrix.mv, b, lambda r: r / matrix.diagonal(), tolerance=1e-12, max_iterations=3)
    assert (short.iterations, short.converged) == (3, False)
    assert short.residual > 1e-12


def test_a_tolerance_below_rounding_ends() -> None:
    matrix, b = _system(2, dtype=torch.float32)
    solution = conjugate_gradients(
        matrix.mv, b, lambda r: r / matrix.diagonal(), tolerance=1e-12, max_iterations=10_000
    )
    assert not solution.converged
    assert solution.residual < 1e-3
    assert solution.x.isfinite().all()


def test_negative_curvature_and_bad_numbers_are_refused() -> None:
    matrix, b = _system(3)
    indefinite = matrix - 20 * torch.eye(30, dtype=torch.float64)
    with pytest.raises(NonPositivePrecisionError, match="iteration"):
        conjugate_gradients(indefinite.mv, b, lambda r: r / matrix.diagonal(), tolerance=1e-9, max_iterations=100)
    with pytest.raises(NonFiniteError, match="iteration 1"):
        conjugate_gradients(
            (matrix * float("nan")).mv, b, lambda r: r / matrix.diagonal(), tolerance=1e-9, max_iterations=100
        )
