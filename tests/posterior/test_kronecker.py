"""Posteriors with Kronecker precisions against full matrices, and the laws of their algebra."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.distributions import MultivariateNormal, kl_divergence

from mergekit_bayes.errors import (
    MethodError,
    NonFiniteError,
    NonPositivePrecisionError,
    NumericalError,
    ShapeMismatchError,
)
from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Mixture, Posterior, Term, closed_form, mismatch
from mergekit_bayes.posterior.closed_form import dense
from mergekit_bayes.posterior.term import combined
from tests.posterior.kronecker_problem import COLUMNS, KINDS, ROWS, Draw, matrix, numbers

MIXES = [("plain",), ("gram",), ("corrected",), ("plain", "plain"), ("plain", "gram", "corrected"), ()]


def _tensor_prior(seed: int) -> torch.Tensor:
    return 0.2 + Draw(seed).normal(ROWS, COLUMNS).square()


def _normal(posterior: Posterior) -> MultivariateNormal:
    return MultivariateNormal(posterior.mean.flatten(), precision_matrix=torch.from_numpy(matrix(posterior)))


@pytest.mark.parametrize("prior", ["scalar", "tensor"])
@pytest.mark.parametrize("kinds", MIXES, ids="+".join)
def test_what_a_precision_does_is_what_its_matrix_does(kinds: tuple[str, ...], prior: str) -> None:
    posterior = Draw(0).posterior(*kinds, prior=0.3 if prior == "scalar" else _tensor_prior(1))
    x, full = Draw(2).normal(ROWS, COLUMNS), matrix(posterior)
    flat = numbers(x).ravel()
    np.testing.assert_allclose(numbers(posterior.precision_times(x)).ravel(), full @ flat, atol=1e-12)
    assert posterior.quadratic(x).item() == pytest.approx(flat @ full @ flat, rel=1e-12)
    np.testing.assert_allclose(numbers(posterior.precision_tensor()).ravel(), np.diag(full), atol=1e-12)
    np.testing.assert_allclose(numbers(dense(posterior)), full, atol=1e-12)


@pytest.mark.parametrize("prior", ["scalar", "tensor"])
@pytest.mark.parametrize("kinds", MIXES, ids="+".join)
def test_densities_and_divergences_are_those_of_the_full_gaussian(kinds: tuple[str, ...], prior: str) -> None:
    q = Draw(3).posterior(*kinds, prior=0.3 if prior == "scalar" else _tensor_prior(4))
    x = Draw(5).normal(ROWS, COLUMNS)
    assert q.log_density(x).item() == pytest.approx(_normal(q).log_prob(x.flatten()).item(), rel=1e-10)
    for p in (Draw(6).posterior("plain", "corrected"), Draw(7).posterior("gram"), Draw(8).diagonal(), Draw(9).prior()):
        assert q.kl(p).item() == pytest.approx(kl_divergence(_normal(q), _normal(p)).item(), rel=1e-8)
        assert p.kl(q).item() == pytest.approx(kl_divergence(_normal(p), _normal(q)).item(), rel=1e-8)
    assert 0 <= q.kl(q).item() < 1e-10


def test_the_precision_tensor_is_that_of_the_closest_diagonal_gaussian() -> None:
    q = Draw(10).posterior("plain", "gram")
    closest = Diagonal(q.mean, q.precision_tensor())
    for factor in (0.9, 1.1):
        assert closest.kl(q) < Diagonal(q.mean, q.precision_tensor() * factor).kl(q)
    variances = np.diag(np.linalg.inv(matrix(q)))
    assert (1 / variances <= numbers(q.precision_tensor()).ravel() + 1e-12).all()


families = st.sampled_from([*MIXES, "isotropic", "diagonal"])


def _posterior(seed: int, family: str | tuple[str, ...]) -> Posterior:
    draw = Draw(seed)
    return (
        draw.prior() if family == "isotropic" else draw.diagonal() if family == "diagonal" else draw.posterior(*family)
    )


def _assert_same(seen: Posterior, wanted: Posterior, room: float = 1e-9) -> None:
    np.testing.assert_allclose(matrix(seen), matrix(wanted), rtol=0, atol=room * np.abs(matrix(wanted)).max())
    np.testing.assert_allclose(numbers(seen.mean), numbers(wanted.mean), rtol=0, atol=room * 10)


@settings(max_examples=25)
@given(st.integers(0, 10**6), families, families, families)
def test_products_commute_associate_and_are_undone(
    seed: int, left: tuple[str, ...], middle: tuple[str, ...], right: tuple[str, ...]
) -> None:
    q, p, r = (_posterior(seed + k, family) for k, family in enumerate((left, middle, right)))
    product = q.product(p)
    _assert_same(product, p.product(q))
    _assert_same(product.product(r), q.product(p.product(r)))
    _assert_same(product.quotient(p), q)


@settings(max_examples=25)
@given(st.integers(0, 10**6), families, st.floats(0.1, 5), st.floats(0.1, 5))
def test_powers_add_up(seed: int, family: tuple[str, ...], alpha: float, beta: float) -> None:
    q = _posterior(seed, family)
    _assert_same(q.power(alpha).product(q.power(beta)), q.power(alpha + beta))
    _assert_same(q.power(alpha).power(1 / alpha), q)


def test_a_product_is_that_of_natural_parameters() -> None:
    q, p = Draw(11).posterior("plain", "corrected"), Draw(12).posterior("gram")
    for other in (p, Draw(13).diagonal(), Draw(14).prior()):
        both = q.product(other)
        assert type(both) is Kronecker
        total = matrix(q) + matrix(other)
        force = matrix(q) @ numbers(q.mean).ravel() + matrix(other) @ numbers(other.mean).ravel()
        np.testing.assert_allclose(numbers(both.mean).ravel(), np.linalg.solve(total, force), atol=1e-10)
        np.testing.assert_allclose(matrix(both), total, atol=1e-10)


def test_terms_that_share_a_factor_become_one_and_a_task_can_be_taken_out() -> None:
    draw = Draw(15)
    plain, gram, corrected = (draw.term(kind) for kind in KINDS)
    other = draw.definite(ROWS)
    assert len(combined([gram, gram.scaled(2.0)])) == 1
    assert len(combined([plain, Term(plain.input, other)])) == 1
    assert len(combined([plain, Term(draw.definite(COLUMNS), plain.output)])) == 1
    assert len(combined([corrected, corrected])) == 1
    assert len(combined([plain, corrected, gram])) == 3
    assert combined([plain, gram, plain.scaled(-1.0), gram.scaled(-1.0)]) == ()


@pytest.mark.parametrize(
    ("kinds", "temperature"),
    [(("plain",), 1.0), (("gram",), 0.25), (("corrected",), 1.0), ((), 1.0), (("plain", "gram", "corrected"), 0.25)],
    ids=str,
)
def test_samples_have_the_covariance_of_the_posterior(kinds: tuple[str, ...], temperature: float) -> None:
    posterior = Draw(16, shape=(2, 3)).posterior(*kinds)
    generator = torch.Generator().manual_seed(0)
    count = 1500
    draws = [posterior.sample(generator, temperature=temperature) - posterior.mean for _ in range(count)]
    samples = numbers(torch.stack(draws)).reshape(count, -1)
    # whitened by the full precision, every second moment is 0 or 1, known to about sqrt(2 / count)
    white = samples @ np.linalg.cholesky(matrix(posterior) / temperature)
    np.testing.assert_allclose(white.T @ white / count, np.eye(6), atol=5 * (2 / count) ** 0.5)
    assert np.abs(white.mean(axis=0)).max() < 5 / count**0.5


def test_samples_repeat_with_the_seed_and_end_in_the_mean() -> None:
    posterior = Draw(17, dtype=torch.float32).posterior("plain", "gram")
    first, again = (posterior.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert torch.equal(posterior.sample(temperature=0.0), posterior.mean)
    with pytest.raises(NumericalError, match="finite and at least 0"):
        posterior.sample(temperature=-1.0)


def test_a_removed_task_is_sampled_from_the_full_matrix() -> None:
    kept, gone = (Draw(seed, shape=(2, 3)).posterior("plain", prior=20.0) for seed in (18, 19))
    thinner = Kronecker(kept.mean, kept.diagonal, [*kept.terms, gone.terms[0].scaled(-0.3)])
    assert np.linalg.eigvalsh(matrix(thinner) - 20 * np.eye(6)).min() < 0
    generator = torch.Generator().manual_seed(1)
    samples = torch.stack([thinner.sample(generator) - thinner.mean for _ in range(1500)])
    white = numbers(samples).reshape(1500, -1) @ np.linalg.cholesky(matrix(thinner))
    np.testing.assert_allclose(white.T @ white / 1500, np.eye(6), atol=0.2)


def test_a_large_layer_without_closed_form_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "DENSE_ENTRIES", 10)
    two, one = Draw(21).posterior("plain", "plain"), Draw(22).posterior("plain")
    with pytest.raises(MethodError, match=r"closed form only for one .* at most 10 weights, not 24"):
        two.log_density(two.mean)
    with pytest.raises(MethodError, match="closed form"):
        one.kl(two)
    one.log_density(one.mean)
    assert two.sample(torch.Generator().manual_seed(0)).shape == (ROWS, COLUMNS)


def test_a_large_indefinite_precision_is_seen_by_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "DENSE_ENTRIES", 10)
    q, p = Draw(23).posterior("plain"), Draw(24).posterior("plain", "corrected")
    with pytest.raises(NonPositivePrecisionError):
        Kronecker(q.mean, q.diagonal, [*q.terms, *(term.scaled(-1.0) for term in p.terms)])
    Kronecker(q.mean, q.diagonal + 500, [*q.terms, *(term.scaled(-1.0) for term in p.terms)])


@pytest.mark.parametrize("kinds", [("plain",), ("gram",), ("corrected",), ("plain", "gram")], ids="+".join)
def test_a_quotient_by_something_sharper_is_refused(kinds: tuple[str, ...]) -> None:
    q = Draw(25).posterior(*kinds)
    with pytest.raises(NonPositivePrecisionError):
        q.quotient(q.power(1.5))
    with pytest.raises(NonPositivePrecisionError):
        q.power(-1.0)
    with pytest.raises(NonPositivePrecisionError):
        Draw(26).prior().quotient(q)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_shrinkage_draws_off_diagonal_entries_to_zero_and_keeps_the_diagonal(kind: str, gamma: float) -> None:
    posterior = Draw(27).posterior(kind)
    shrunk = posterior.shrunk(gamma).check()
    full = matrix(posterior)
    if kind == "corrected":
        wanted = (1 - gamma) * full + gamma * np.diag(np.diag(full))
    else:
        (term,) = posterior.terms
        inner, outer = numbers(term.input), np.eye(ROWS) if term.output is None else numbers(term.output)
        less = [(1 - gamma) * each + gamma * np.diag(np.diag(each)) for each in (outer, inner)]
        wanted = np.kron(*less) + 0.3 * np.eye(ROWS * COLUMNS)
    np.testing.assert_allclose(matrix(shrunk), wanted, atol=1e-12)
    np.testing.assert_allclose(np.diag(matrix(shrunk)), np.diag(full), atol=1e-12)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_other_shrinkage_is_refused(gamma: float) -> None:
    with pytest.raises(NumericalError, match="between 0 and 1"):
        Draw(28).posterior("plain").shrunk(gamma)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_only_averages_the_precision_over_the_outputs(kind: str) -> None:
    posterior = Draw(29).posterior(kind, prior=_tensor_prior(30))
    blocks = matrix(posterior).reshape(ROWS, COLUMNS, ROWS, COLUMNS)
    mean = sum(blocks[row, :, row, :] for row in range(ROWS)) / ROWS
    inputs = posterior.inputs_only().check()
    np.testing.assert_allclose(matrix(inputs), np.kron(np.eye(ROWS), mean), atol=1e-12)
    assert inputs.diagonal.dim() == 0
    assert len(inputs.terms) == 1


@pytest.mark.parametrize("base", ["isotropic", "diagonal", "kronecker"])
@pytest.mark.parametrize("source", ["isotropic", "diagonal", "kronecker"])
def test_the_mismatch_counts_off_diagonal_curvature(source: str, base: str) -> None:
    choose = {
        "isotropic": lambda d: d.prior(),
        "diagonal": lambda d: d.diagonal(),
        "kronecker": lambda d: d.posterior("plain"),
    }
    q, p, merged = choose[source](Draw(31)), choose[base](Draw(32)), Draw(33).normal(ROWS, COLUMNS)
    gap = numbers(merged - q.mean).ravel()
    assert mismatch(merged, q, p).item() == pytest.approx(gap @ (matrix(q) - matrix(p)) @ gap / 2, rel=1e-10)


def test_the_mismatch_of_a_huge_prior_does_not_drown_in_it() -> None:
    """In float32, 1e8 + curvature - 1e8 would keep no digit of the curvature's share."""
    draw = Draw(34, dtype=torch.float32)
    q = draw.posterior("plain", prior=1e8)
    merged = q.mean + draw.normal(ROWS, COLUMNS)
    wanted = Kronecker(q.mean, torch.tensor(1.0), q.terms).quadratic(merged - q.mean) - (merged - q.mean).square().sum()
    assert mismatch(merged, q, Isotropic(q.mean, 1e8)).item() == pytest.approx(wanted.item() / 2, rel=1e-5)


def test_shapes_dtypes_and_values_are_checked() -> None:
    draw = Draw(35)
    mean, (term,) = draw.normal(ROWS, COLUMNS), draw.posterior("plain").terms
    one = torch.ones((), dtype=torch.float64)
    for wrong in (Term(term.output, term.output), Term(term.input, term.input), Term(term.input, term.output, mean.T)):
        with pytest.raises(ShapeMismatchError, match=r"of term 0 has shape .*needs"):
            Kronecker(mean, one, [wrong])
    with pytest.raises(ShapeMismatchError, match="not a matrix"):
        Kronecker(mean[0], one, [])
    with pytest.raises(ShapeMismatchError, match=r"diagonal \(6,\)"):
        Kronecker(mean, mean[0], [term])
    with pytest.raises(ShapeMismatchError, match="must agree"):
        Kronecker(mean, one, [term.to(torch.float32)])
    with pytest.raises(NonFiniteError, match="input holds NaN"):
        Kronecker(mean, one, [term._replace(input=term.input * float("nan"))])
    with pytest.raises(NumericalError, match="not symmetric"):
        Kronecker(mean, one, [term._replace(input=draw.normal(COLUMNS, COLUMNS))])
    with pytest.raises(NonPositivePrecisionError):
        Kronecker(mean, -one, [term])
    with pytest.raises(NonPositivePrecisionError):
        Kronecker(mean, one, [term.scaled(-50.0)])
    assert repr(Kronecker(mean, one, [term])) == "Kronecker(shape=(4, 6), dtype=torch.float64, terms=1)"


def test_factors_that_rounding_made_slightly_indefinite_pass() -> None:
    root = Draw(36, dtype=torch.float32).normal(3, COLUMNS)
    singular = root.mT @ root  # rank 3 of 6
    assert float(torch.linalg.eigvalsh(singular).min()) < 1e-6
    Kronecker(torch.zeros(ROWS, COLUMNS), torch.tensor(1e-6), [Term(singular, torch.eye(ROWS))])
    Kronecker(torch.zeros(ROWS, COLUMNS), torch.tensor(1e-6), [Term(singular * 0, None)])


def test_posteriors_of_different_tensors_and_richer_families_do_not_mix() -> None:
    q = Draw(37).posterior("plain")
    for operation in (q.product, q.quotient, q.kl):
        with pytest.raises(ShapeMismatchError, match="different tensors"):
            operation(Draw(38, shape=(3, 6)).posterior("plain"))
    assert type(q.product(Mixture([q, Draw(39).posterior("plain")]))) is Mixture
    with pytest.raises(MethodError, match="`mixture` posterior cannot be expressed"):
        q.admit(Mixture([q]))
    with pytest.raises(ShapeMismatchError, match="x has shape"):
        q.log_density(q.mean[0])


def test_an_empty_layer_is_a_layer() -> None:
    empty = Kronecker(torch.zeros(0, 3), torch.ones(()), [Term(torch.eye(3), torch.zeros(0, 0))])
    assert empty.precision_tensor().shape == (0, 3)
    assert empty.quadratic(empty.mean).item() == 0
