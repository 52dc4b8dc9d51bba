"""Low-rank approximation under a precision: closed forms, an independent solver, and never worse than plain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_bayes.merge import low_rank as module
from mergekit_bayes.merge.low_rank import LowRank, low_rank
from mergekit_bayes.merge.truncation import truncate_dense
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior
from mergekit_bayes.posterior.kronecker import Kronecker
from mergekit_bayes.posterior.term import Term
from tests.merge.test_projected import definite, normal, positive, precisions


def _kept(posterior: Posterior, rank: int) -> LowRank:
    return low_rank(posterior, rank, torch.Generator().manual_seed(0))


def _svd(matrix: Tensor, rank: int) -> Tensor:
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("constant", ["isotropic", "diagonal"])
def test_a_constant_precision_gives_the_truncated_svd_to_the_last_bit(rank: int, constant: str) -> None:
    mean = normal(1, 9, 7)
    posterior = Isotropic(mean, 2.0) if constant == "isotropic" else Diagonal(mean, torch.full_like(mean, 2.0))
    kept, plain = _kept(posterior, rank), truncate_dense(mean, rank, torch.Generator())
    assert torch.equal(kept.a, plain.a)
    assert torch.equal(kept.b, plain.b)
    assert kept.loss == kept.plain_loss
    lost = torch.linalg.svdvals(mean)[rank:].square().sum()
    assert kept.loss == pytest.approx(float(lost))  # 1/2 times a precision of 2
    assert kept.lost_energy == pytest.approx(float(lost / mean.square().sum()))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_weights_of_rank_one_are_solved_exactly(rank: int) -> None:
    mean, rows, columns = normal(2, 9, 7), positive(3, 9, 1), positive(4, 1, 7)
    kept = _kept(Diagonal(mean, rows * columns), rank)
    wanted = _svd(rows.sqrt() * mean * columns.sqrt(), rank) / (rows.sqrt() * columns.sqrt())
    torch.testing.assert_close(kept.b @ kept.a, wanted)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("outputs", [True, False])
def test_one_kronecker_term_is_solved_exactly(rank: int, outputs: bool) -> None:
    """Up to the prior, which is no product: here it is next to nothing."""
    mean, of_inputs = normal(5, 8, 6), definite(6, 6)
    of_outputs = definite(7, 8) if outputs else torch.eye(8, dtype=torch.float64)
    term = Term(of_inputs, of_outputs if outputs else None)
    kept = _kept(Kronecker(mean, torch.tensor(1e-13).double(), [term]), rank)
    (left, left_inverse), (right, right_inverse) = _root(of_outputs), _root(of_inputs)
    wanted = left_inverse @ _svd(left @ mean @ right, rank) @ right_inverse
    lost = torch.linalg.svdvals(left @ mean @ right)[rank:].square().sum() / 2
    assert kept.loss == pytest.approx(float(lost), rel=1e-6)
    torch.testing.assert_close(kept.b @ kept.a, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["diagonal", "plain", "gram", "corrected", "all"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_form_of_precision_is_better_off(form: str, rank: int) -> None:
    posterior = precisions(12, 9)[form]
    kept = _kept(posterior, rank)
    x = kept.b @ kept.a
    assert (kept.b.shape, kept.a.shape) == ((12, rank), (rank, 9))
    assert kept.loss == pytest.approx(float(posterior.quadratic(x - posterior.mean)) / 2, rel=1e-9)
    plain = _svd(posterior.mean, rank)
    assert kept.plain_loss == pytest.approx(float(posterior.quadratic(plain - posterior.mean)) / 2, rel=1e-9)
    assert kept.loss < 0.98 * kept.plain_loss
    lost = torch.linalg.norm(posterior.mean - x).square() / torch.linalg.norm(posterior.mean).square()
    assert kept.lost_energy == pytest.approx(float(lost))


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_close_to_what_exact_alternation_reaches_in_the_end(spread: float) -> None:
    """An independent solver in numpy: rows and columns by normal equations, a thousand times."""
    generator = torch.Generator().manual_seed(8)
    mean = torch.randn(20, 15, generator=generator, dtype=torch.float64)
    precision = (spread * torch.randn(20, 15, generator=generator, dtype=torch.float64)).exp()
    kept = _kept(Diagonal(mean, precision), 4)
    best = _alternated(mean.numpy(), precision.numpy(), 4)
    assert kept.loss < best + 0.25 * (kept.plain_loss - best)


def _alternated(mean: np.ndarray, precision: np.ndarray, rank: int) -> float:
    u, sigma, vh = np.linalg.svd(mean, full_matrices=False)
    b, a = u[:, :rank] * sigma[:rank], vh[:rank]
    for _ in range(1000):
        b = np.stack([np.linalg.solve((a * p) @ a.T, a @ (p * w)) for p, w in zip(precision, mean, strict=True)])
        a = np.stack(
            [np.linalg.solve((b.T * p) @ b, b.T @ (p * w)) for p, w in zip(precision.T, mean.T, strict=True)]
        ).T
    return float(0.5 * (precision * (mean - b @ a) ** 2).sum())


@pytest.mark.parametrize("form", ["diagonal", "all"])
def test_no_turn_makes_it_worse(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = precisions(12, 9)[form]
    losses = []
    for sweeps in range(7):
        monkeypatch.setattr(module, "SWEEPS", sweeps)
        losses.append(_kept(posterior, 3).loss)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_factors_are_those_of_a_singular_value_decomposition() -> None:
    kept = _kept(precisions(12, 9)["all"], 3)
    sigma = torch.linalg.svdvals(kept.b @ kept.a)[:3]
    torch.testing.assert_close(kept.a @ kept.a.T, torch.diag(sigma))
    torch.testing.assert_close(kept.b.T @ kept.b, torch.diag(sigma))


def test_a_rank_that_is_enough_loses_nothing() -> None:
    posterior = precisions(12, 9)["all"].with_mean(normal(9, 12, 2) @ normal(10, 2, 9))
    kept = _kept(posterior, 2)
    torch.testing.assert_close(kept.b @ kept.a, posterior.mean)
    assert kept.loss < 1e-12
    nothing = _kept(posterior.with_mean(torch.zeros(12, 9, dtype=torch.float64)), 2)
    assert (nothing.loss, nothing.plain_loss, nothing.lost_energy) == (0.0, 0.0, 0.0)


def test_a_mean_of_a_rank_below_the_asked_one_has_factors_of_that_rank() -> None:
    posterior = Diagonal(torch.ones(6, 5, dtype=torch.float64), positive(11, 6, 5))
    kept = _kept(posterior, 3)
    torch.testing.assert_close(kept.b @ kept.a, posterior.mean)


@pytest.mark.parametrize("spread", [4.0, 10.0])
def test_single_precision_and_precisions_over_many_magnitudes(spread: float) -> None:
    generator = torch.Generator().manual_seed(12)
    mean = torch.randn(40, 30, generator=generator)
    precision = (spread * torch.randn(40, 30, generator=generator)).exp()
    kept = _kept(Diagonal(mean, precision), 5)
    assert kept.a.isfinite().all()
    assert kept.b.isfinite().all()
    assert kept.loss < 0.5 * kept.plain_loss
    again = _kept(Diagonal(mean, precision), 5)
    assert torch.equal(kept.a, again.a)
    assert torch.equal(kept.b, again.b)


def test_singular_factors_leave_the_plain_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 factors of few examples, whose sum no Cholesky decomposition takes."""
    monkeypatch.setattr(module, "_root", lambda diagonal, matrices: None)
    posterior = precisions(12, 9)["all"]
    kept = _kept(posterior, 3)
    assert kept.loss < kept.plain_loss


@pytest.mark.parametrize("size", [0.5, 50.0])
def test_a_precision_that_rounding_made_indefinite_ends_the_turns(size: float) -> None:
    """A source taken away leaves next to nothing, or less, in one direction; the rest is still cut, and no worse."""
    mean, direction = normal(13, 8, 6), torch.nn.functional.normalize(normal(14, 6), dim=0)
    term = Term(definite(15, 6) * 1e-3 - size * torch.outer(direction, direction), None)
    kept = _kept(Kronecker.unchecked(mean, torch.tensor(0.4).double(), [term]), 2)
    assert kept.a.isfinite().all()
    assert kept.loss <= kept.plain_loss
