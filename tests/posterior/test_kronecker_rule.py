"""The rule for Kronecker precisions against dense solves in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mergekit_bayes.errors import MethodError, NonPositivePrecisionError, ShapeMismatchError
from mergekit_bayes.posterior import (
    Diagonal,
    Isotropic,
    Kronecker,
    Posterior,
    Term,
    merge_kronecker,
    merge_posteriors,
    preconditioner,
)
from tests.oracles.kronecker import merge_dense
from tests.posterior.kronecker_problem import COLUMNS, ROWS, Draw, matrix, numbers

WEIGHTS = {"simplex": (0.5, 0.25, 0.25), "ones": (1.0, 1.0, 1.0), "removal": (0.9, 0.8, -0.02)}
SOURCES = [
    ("plain", "plain", "plain"),
    ("gram", "gram", "gram"),
    ("corrected", "corrected", "corrected"),
    ("plain", "gram", "corrected"),
]


def _weights(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _assert_solved(
    merged: Kronecker, base: Posterior, sources: Sequence[Posterior], weights: Sequence[float], room: float = 1e-9
) -> None:
    mean, total = merge_dense(
        numbers(base.mean), matrix(base), [numbers(q.mean) for q in sources], [matrix(q) for q in sources], weights
    )
    np.testing.assert_allclose(numbers(merged.mean), mean, rtol=0, atol=room)
    np.testing.assert_allclose(matrix(merged), total, rtol=0, atol=room * 10)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("prior", ["isotropic", "diagonal", "kronecker"])
@pytest.mark.parametrize("kinds", SOURCES, ids="+".join)
def test_the_rule_is_that_of_full_matrices(kinds: tuple[str, ...], prior: str, weights: tuple[float, ...]) -> None:
    draw = Draw(0)
    base = {"isotropic": draw.prior, "diagonal": draw.diagonal, "kronecker": lambda: draw.posterior("plain")}[prior]()
    sources = [draw.beyond(base, kind) for kind in kinds]
    merged, solution = merge_kronecker(base, sources, _weights(weights), tolerance=1e-12)
    assert solution.converged
    _assert_solved(merged, base, sources, weights)


def test_poorer_families_take_part() -> None:
    draw = Draw(1)
    base, sources = draw.prior(), [draw.posterior("plain"), draw.diagonal(), draw.prior(2.0)]
    merged = merge_posteriors(base, sources, _weights((0.7, 0.6, 0.5)))
    assert type(merged) is Kronecker
    _assert_solved(merged, base, sources, (0.7, 0.6, 0.5), room=1e-3)
    _assert_solved(
        merge_posteriors(draw.posterior("gram"), sources[1:], _weights((0.5, 0.5))), base, sources[1:], (0.5, 0.5)
    )


def test_the_rule_is_a_product_of_powers_of_quotients() -> None:
    draw = Draw(2)
    base = draw.prior()
    sources = [base.product(draw.posterior(kind)) for kind in ("plain", "corrected")]
    wanted: Posterior = base
    for source, alpha in zip(sources, (0.8, 0.5), strict=True):
        wanted = wanted.product(source.quotient(base).power(alpha))
    merged, _ = merge_kronecker(base, sources, _weights((0.8, 0.5)), tolerance=1e-12)
    np.testing.assert_allclose(numbers(merged.mean), numbers(wanted.mean), atol=1e-10)
    np.testing.assert_allclose(matrix(merged), matrix(wanted), atol=1e-10)


def test_on_the_simplex_the_base_drops_out_to_the_last_bit() -> None:
    draw = Draw(3)
    sources = [draw.posterior("plain") for _ in range(3)]
    weights = _weights(WEIGHTS["simplex"])
    seen = [merge_kronecker(base, sources, weights)[0] for base in (draw.prior(1e6), draw.diagonal())]
    assert torch.equal(seen[0].mean, seen[1].mean)
    assert torch.equal(seen[0].precision_tensor(), seen[1].precision_tensor())


@pytest.mark.parametrize("kind", ["plain", "gram", "corrected"])
def test_one_task_is_returned_and_equal_tasks_average(kind: str) -> None:
    draw = Draw(4)
    base, source = draw.prior(), draw.posterior(kind)
    merged, solution = merge_kronecker(base, [source], _weights((1.0,)))
    assert (merged.mean - source.mean).abs().max() < 1e-14
    assert solution.residual < 1e-10
    moved = source.with_mean(draw.normal(ROWS, COLUMNS))
    average, _ = merge_kronecker(base, [source, moved], _weights((0.5, 0.5)), tolerance=1e-12)
    np.testing.assert_allclose(numbers(average.mean), numbers((source.mean + moved.mean) / 2), atol=1e-12)


def test_one_term_beside_a_scalar_needs_one_iteration() -> None:
    draw = Draw(5)
    base, source = draw.prior(), draw.posterior("plain")
    _, solution = merge_kronecker(base, [source], _weights((0.4,)), tolerance=1e-10)
    assert solution.iterations == 1
    grams = [draw.posterior("gram") for _ in range(3)]
    assert merge_kronecker(base, grams, _weights((1.0, 1.0, 1.0)))[1].iterations == 0


def test_more_iterations_come_closer_and_a_tolerance_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioner, "BLOCK", 1)
    draw = Draw(6, shape=(12, 20))
    base, sources = draw.prior(0.01), [draw.posterior("plain", prior=0.01) for _ in range(4)]
    weights = (1.0, 1.0, 1.0, 1.0)
    exact, _ = merge_kronecker(base, sources, _weights(weights), tolerance=1e-13)
    errors = []
    for limit in (1, 2, 4, 8, 16):
        merged, solution = merge_kronecker(base, sources, _weights(weights), tolerance=1e-12, max_iterations=limit)
        assert (solution.iterations, solution.converged) == (limit, False)
        errors.append(float(exact.quadratic(merged.mean - exact.mean)))
    assert errors == sorted(errors, reverse=True)
    arithmetic = base.mean + sum(source.mean - base.mean for source in sources)
    start = float(exact.quadratic(arithmetic - exact.mean))
    assert errors[0] < start
    for tolerance in (1e-2, 1e-4, 1e-6):
        merged, solution = merge_kronecker(base, sources, _weights(weights), tolerance=tolerance)
        assert solution.converged
        assert solution.residual <= tolerance
        # in the norm of S, whose square is twice the predicted loss
        assert exact.quadratic(merged.mean - exact.mean) <= 10 * tolerance**2 * start


@pytest.mark.parametrize("kinds", SOURCES, ids="+".join)
def test_the_block_of_the_preconditioner_saves_iterations_and_changes_nothing_else(
    kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    iterations = []
    for block in (1, 40, 1000):
        draw = Draw(12, shape=(12, 9))
        base = draw.diagonal()
        sources = [draw.beyond(base, kind) for kind in kinds]
        monkeypatch.setattr(preconditioner, "BLOCK", block)
        merged, solution = merge_kronecker(base, sources, _weights((0.5, 0.7, 0.9)), tolerance=1e-11)
        _assert_solved(merged, base, sources, (0.5, 0.7, 0.9))
        iterations.append(solution.iterations)
    if kinds == ("plain", "plain", "plain"):
        assert iterations == sorted(iterations, reverse=True)
        assert iterations[2] < iterations[0]


def test_single_precision_agrees_and_leaves_unseen_directions_alone() -> None:
    """Three examples of twelve inputs, and a prior below the rounding of the curvature: nothing may be amplified.

    The reference is the same with factors that were never rounded.
    """
    draw, prior, alpha = Draw(7, shape=(5, 12)), 1e-5, (0.5, 0.25, 0.25)
    base, sources = draw.prior(prior), []
    for _ in range(3):
        seen = 100 * draw.normal(3, 12)
        term = Term(seen.mT @ seen, draw.definite(5))
        sources.append(Kronecker(draw.normal(5, 12), torch.tensor(prior, dtype=torch.float64), [term]))
    single = [source.to(torch.float32) for source in sources]
    rounded = Isotropic(base.mean.float(), prior)
    average = sum(weight * source.mean for weight, source in zip(alpha, sources, strict=True))
    for inputs_only in (False, True):
        exact, seen = (
            merge_kronecker(
                start, [q.inputs_only() if inputs_only else q for q in chosen], _weights(alpha), tolerance=tolerance
            )[0]
            for start, chosen, tolerance in ((base, sources, 1e-12), (rounded, single, 1e-4))
        )
        gap = seen.mean.double() - exact.mean
        assert gap.abs().max() < 1, "no more than sources differ"
        assert exact.quadratic(gap) < 1e-6 * exact.quadratic(average - exact.mean)


@pytest.mark.parametrize("kinds", [("plain", "plain"), ("gram", "gram"), ("corrected", "plain")], ids="+".join)
def test_removing_more_than_was_learned_is_refused(kinds: tuple[str, str]) -> None:
    draw = Draw(8)
    base, sources = draw.prior(), [draw.posterior(kind) for kind in kinds]
    with pytest.raises(NonPositivePrecisionError, match=r"prior|every direction"):
        merge_kronecker(base, sources, _weights((0.1, -5.0)))


def test_an_indefinite_precision_with_a_positive_diagonal_is_seen_by_the_solver() -> None:
    """Along the diagonal all is well; only the direction (1, -1) has negative curvature."""
    skew = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    source = Kronecker.unchecked(
        torch.tensor([[1.0, -0.5]], dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.float64),
        [Term(skew, skew[:1, :1])],
    )
    with pytest.raises(NonPositivePrecisionError):
        merge_kronecker(Isotropic(source.mean * 0, 0.1), [source], _weights((0.5,)))


def test_a_floor_bounds_the_diagonal_part() -> None:
    draw = Draw(9)
    base, sources = draw.prior(), [draw.posterior("plain"), draw.diagonal()]
    merged, _ = merge_kronecker(base, sources, _weights((1.0, -3.0)), floor=0.25, tolerance=1e-12)
    assert merged.diagonal.min() == 0.25
    merged.check()
    untouched, _ = merge_kronecker(base, sources, _weights((1.0, 1.0)), floor=1e-6)
    assert torch.equal(untouched.diagonal, merge_kronecker(base, sources, _weights((1.0, 1.0)))[0].diagonal)


def test_a_merge_can_be_merged_further_and_undone() -> None:
    draw = Draw(10)
    base = draw.prior()
    sources = [draw.posterior(kind) for kind in ("plain", "corrected", "plain", "gram")]
    two = _weights((1.0, 1.0))
    halves = [merge_kronecker(base, sources[i : i + 2], two, tolerance=1e-12)[0] for i in (0, 2)]
    whole, _ = merge_kronecker(base, halves, two, tolerance=1e-12)
    _assert_solved(whole, base, sources, (1.0,) * 4)
    left, _ = merge_kronecker(base, [whole, halves[1]], _weights((1.0, -1.0)), tolerance=1e-12)
    np.testing.assert_allclose(numbers(left.mean), numbers(halves[0].mean), atol=1e-9)
    assert len(left.terms) == 2, "what was added is gone to the last bit"


def test_inputs_are_checked_and_not_changed() -> None:
    draw = Draw(11)
    base, sources = draw.prior(), [draw.posterior("plain"), draw.posterior("gram")]
    parts = [base.mean, *(part for q in sources for part in (q.mean, q.diagonal, *q.terms[0].tensors()))]
    before = [part.clone() for part in parts]
    first, again = (merge_kronecker(base, sources, _weights((0.5, 0.7)))[0] for _ in range(2))
    assert torch.equal(first.mean, again.mean)
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    with pytest.raises(MethodError, match="one weight each"):
        merge_kronecker(base, sources, _weights((1.0,)))
    with pytest.raises(ShapeMismatchError, match="different tensors"):
        merge_kronecker(base, [sources[0], Diagonal(base.mean[0], base.mean[0].exp())], _weights((1.0, 1.0)))
