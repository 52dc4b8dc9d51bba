"""The methods with Kronecker factors: their parameters, their measures, and what they do where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_bayes.errors import MethodError, NonPositivePrecisionError
from mergekit_bayes.merge.registry import Merge, get_method, methods_for_family
from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Mixture, Posterior, Term, merge_posteriors
from tests.oracles.gram import merge_row
from tests.oracles.kronecker import merge_dense
from tests.posterior.kronecker_problem import COLUMNS, KINDS, ROWS, Draw, matrix, numbers

WEIGHTS = (0.9, 0.7, 0.4)


def _call(method: str, base: Posterior, sources: list[Posterior], **options: float) -> Merge:
    weights = torch.tensor(WEIGHTS[: len(sources)], dtype=torch.float64)
    merge = get_method(method).kernel(base, sources, weights, **options)
    assert isinstance(merge, Merge)
    return merge


def _sources(seed: int, *kinds: str) -> tuple[Isotropic, list[Posterior]]:
    draw = Draw(seed)
    base = draw.prior()
    return base, [draw.beyond(base, kind) for kind in kinds]


def _shrunk(posterior: Posterior, gamma: float) -> np.ndarray:
    """The full matrix of a posterior whose factors lost a share of their off-diagonal entries."""
    (term,) = posterior.terms  # type: ignore[attr-defined]
    if term.eigenvalues is not None:
        full = matrix(posterior)
        return (1 - gamma) * full + gamma * np.diag(np.diag(full))
    inner, outer = numbers(term.input), np.eye(ROWS) if term.output is None else numbers(term.output)
    less = [(1 - gamma) * each + gamma * np.diag(np.diag(each)) for each in (outer, inner)]
    return np.kron(*less) + 0.3 * np.eye(ROWS * COLUMNS)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("kinds", [(kind,) * 3 for kind in KINDS], ids="+".join)
def test_kronecker_is_the_rule_with_shrunk_factors(kinds: tuple[str, ...], gamma: float) -> None:
    base, sources = _sources(0, *kinds)
    merge = _call("kronecker", base, sources, shrinkage=gamma, tolerance=1e-12)
    mean, total = merge_dense(
        numbers(base.mean),
        matrix(base),
        [numbers(source.mean) for source in sources],
        [_shrunk(source, gamma) for source in sources],
        WEIGHTS,
    )
    np.testing.assert_allclose(numbers(merge.posterior.mean), mean, atol=1e-9)
    np.testing.assert_allclose(matrix(merge.posterior), total, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.1])
@pytest.mark.parametrize("kinds", [("gram",) * 3, ("plain",) * 3, ("corrected", "gram", "plain")], ids="+".join)
@pytest.mark.parametrize("prior", ["scalar", "tensor"])
def test_gram_solves_every_row_with_the_curvature_of_the_inputs(
    prior: str, kinds: tuple[str, ...], gamma: float
) -> None:
    base, sources = _sources(1, *kinds)
    everyone: list[Posterior] = [base, *sources]
    if prior == "tensor":
        everyone[0] = Draw(2).diagonal()

    def inputs(posterior: Posterior) -> np.ndarray:
        blocks = matrix(posterior).reshape(ROWS, COLUMNS, ROWS, COLUMNS)
        mean = sum(blocks[row, :, row, :] for row in range(ROWS)) / ROWS
        return (1 - gamma) * mean + gamma * np.diag(np.diag(mean))

    rows = [
        merge_row(
            numbers(everyone[0].mean)[row],
            inputs(everyone[0]),
            [numbers(source.mean)[row] for source in sources],
            [inputs(source) for source in sources],
            WEIGHTS,
        )[0]
        for row in range(ROWS)
    ]
    merge = _call("gram", everyone[0], sources, shrinkage=gamma)
    np.testing.assert_allclose(numbers(merge.posterior.mean), np.stack(rows), atol=1e-10)
    assert merge.measures == {}


def test_gram_is_regmean_where_there_is_no_prior() -> None:
    """W = sum_t W_t A_t (sum_t A_t)^-1, with W of shape (out, in)."""
    draw = Draw(3)
    nothing = torch.tensor(1e-12, dtype=torch.float64)
    sources = [Kronecker(draw.normal(ROWS, COLUMNS), nothing, [draw.term("gram")]) for _ in range(3)]
    merge = get_method("regmean").kernel(
        Isotropic(draw.normal(ROWS, COLUMNS), 1e-12),
        sources,
        torch.full((3,), 1 / 3, dtype=torch.float64),
        shrinkage=0.0,
    )
    grams = [numbers(source.terms[0].input) for source in sources]
    force = sum(numbers(source.mean) @ gram for source, gram in zip(sources, grams, strict=True))
    np.testing.assert_allclose(numbers(merge.posterior.mean), force @ np.linalg.inv(sum(grams)), atol=1e-8)


def test_kronecker_reports_how_its_system_was_solved() -> None:
    base, sources = _sources(4, "plain", "plain", "corrected")
    exact = _call("kronecker", base, sources, tolerance=1e-10)
    assert exact.measures["residual"] <= 1e-10
    assert exact.measures["iterations"] > 3
    rough = _call("kronecker", base, sources, max_iterations=2)
    assert rough.measures["iterations"] == 2
    assert exact.measures["residual"] < rough.measures["residual"] < 1


@pytest.mark.parametrize("method", ["kronecker", "gram", "mixture"])
def test_without_factors_they_are_the_rule(method: str) -> None:
    draw = Draw(5)
    base, sources = draw.prior(), [draw.diagonal(), draw.prior(2.0), draw.diagonal()]
    for shape in ((24,), (4, 6), (2, 2, 6)):
        reshaped = [Diagonal(q.mean.reshape(shape), q.precision_tensor().expand(4, 6).reshape(shape)) for q in sources]
        prior = Isotropic(base.mean.reshape(shape), 0.3)
        wanted = merge_posteriors(prior, reshaped, torch.tensor(WEIGHTS, dtype=torch.float64), floor=1.0)
        merge = _call(method, prior, reshaped, floor=1.0)
        assert torch.equal(merge.posterior.mean, wanted.mean)
        assert merge.measures == {}


@pytest.mark.parametrize("method", ["kronecker", "gram"])
def test_a_layer_that_some_sources_know_less_about(method: str) -> None:
    draw = Draw(6)
    base = draw.prior()
    merge = _call(
        method, base, [draw.beyond(base, "plain"), draw.diagonal(), Isotropic(draw.normal(ROWS, COLUMNS), 0.3)]
    )
    assert isinstance(merge.posterior, Kronecker)
    assert merge.posterior.check().mean.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("method", ["kronecker", "gram", "posterior"])
def test_removing_more_than_was_learned_is_refused(method: str) -> None:
    base, sources = _sources(7, "plain", "plain")
    with pytest.raises(NonPositivePrecisionError):
        get_method(method).kernel(base, sources, torch.tensor((0.1, -4.0), dtype=torch.float64))


def test_posterior_takes_every_family() -> None:
    base, sources = _sources(8, "plain", "gram")
    weights = torch.tensor((0.5, 0.5), dtype=torch.float64)
    kernel = get_method("posterior").kernel
    assert type(kernel(base, sources, weights)) is Kronecker
    assert type(kernel(base, [Mixture(sources), sources[0]], weights)) is Kronecker
    assert methods_for_family("kronecker") == ("gram", "kronecker", "mixture", "posterior")
    assert methods_for_family("mixture") == ("mixture", "posterior")


def test_mixture_reports_responsibilities_per_task_and_component() -> None:
    draw = Draw(9)
    base = draw.prior()
    tasks = [Mixture([draw.diagonal() for _ in range(3)]), draw.diagonal()]
    merge = _call("mixture", base, tasks, temperature=0.5)
    shares = merge.measures["responsibilities"]
    assert isinstance(shares, dict)
    assert list(shares) == ["0.0", "0.1", "0.2", "1.0"]
    assert sum(shares[f"0.{k}"] for k in range(3)) == pytest.approx(1)
    assert shares["1.0"] == 1
    assert merge.measures["iterations"] > 1
    assert np.isfinite(merge.measures["objective"])
    even = _call("mixture", base, tasks, temperature=1e8).measures["responsibilities"]
    assert even["0.0"] == pytest.approx(1 / 3)
    assert _call("mixture", base, tasks, max_iterations=1).measures["iterations"] == 1


@pytest.mark.parametrize(
    ("method", "parameter", "value"),
    [
        ("kronecker", "shrinkage", 1.5),
        ("gram", "shrinkage", -0.1),
        ("mixture", "temperature", 0.0),
        ("kronecker", "max_iterations", 0),
    ],
)
def test_parameters_have_their_ranges(method: str, parameter: str, value: float) -> None:
    with pytest.raises(MethodError, match=parameter):
        get_method(method).kernel_options({parameter: value})
    assert get_method(method).kernel_options({})[parameter] == get_method(method).kernel.__kwdefaults__[parameter]


def test_terms_are_not_changed() -> None:
    base, sources = _sources(10, "plain", "corrected", "gram")
    parts = [part for source in sources for part in (source.mean, source.diagonal, *source.terms[0].tensors())]  # type: ignore[attr-defined]
    before = [part.clone() for part in parts]
    for method in ("kronecker", "gram", "posterior"):
        get_method(method).kernel(base, sources, torch.tensor(WEIGHTS, dtype=torch.float64))
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    assert isinstance(sources[0].terms[0], Term)  # type: ignore[attr-defined]
