"""Predicted loss increases on a family of quadratic losses, where they must be exact, and against float64 sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Term, merge_posteriors, mismatch
from mergekit_bayes.preview.design import lattice, random_mixes, scaled
from mergekit_bayes.preview.pieces import Piece, add_products
from mergekit_bayes.preview.ratios import SharedRatios
from mergekit_bayes.preview.surrogate import Block, QuadraticForms, rule_increases, shares_of

ENTRIES, SOURCES, PRIOR = 400, 3, 1e-2


class Family:
    """Losses l_t(m) = 1/2 (m - c_t)^T H_t (m - c_t) of diagonal curvature; source t is the minimum of its own."""

    def __init__(self, *, spread: float = 1.0) -> None:
        generator = np.random.Generator(np.random.PCG64(3))
        self.origin = generator.normal(size=ENTRIES)
        self.centres = self.origin + generator.normal(size=(SOURCES, ENTRIES)) * 0.3
        self.curvature = np.exp(spread * generator.normal(size=(SOURCES, ENTRIES))) * 0.05

    def loss(self, mean: np.ndarray) -> np.ndarray:
        return np.array([(h * (mean - c) ** 2).sum() / 2 for h, c in zip(self.curvature, self.centres, strict=True)])

    @property
    def block(self) -> Block:
        return Block(torch.tensor(self.centres - self.origin), torch.tensor(self.curvature))

    @property
    def precisions(self) -> Tensor:
        prior = np.full((1, ENTRIES), PRIOR)
        return torch.tensor(np.concatenate([self.curvature + PRIOR, prior]))

    def ruled(self, mix: np.ndarray) -> np.ndarray:
        """The mean that the library's own rule gives."""
        base = Diagonal(torch.tensor(self.origin), torch.full((ENTRIES,), PRIOR, dtype=torch.float64))
        sources = [
            Diagonal(torch.tensor(c), torch.tensor(h + PRIOR))
            for c, h in zip(self.centres, self.curvature, strict=True)
        ]
        return merge_posteriors(base, sources, torch.tensor(mix)).mean.numpy()


MIXES = np.array(scaled([*lattice(SOURCES, 4), *random_mixes(SOURCES, 6, seed=1)], [1.0, 0.5, 2.0]))


def test_weighted_sums_of_quadratic_losses_are_exact() -> None:
    family, forms = Family(), QuadraticForms(SOURCES)
    for part in (slice(0, 100), slice(100, None)):
        forms.add(Block(*(rows[:, part] for rows in family.block)))
    found = forms.increases(torch.tensor(MIXES)).numpy()
    moves = family.centres - family.origin
    expected = [family.loss(family.origin + mix @ moves) for mix in MIXES]
    assert np.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert np.allclose(forms.at_base, family.loss(family.origin))


def test_the_rule_on_quadratic_losses_is_exact_to_single_precision() -> None:
    family = Family()
    found = rule_increases(family.block, family.precisions, shares_of(torch.tensor(MIXES), prior=True))
    expected = np.array([family.loss(family.ruled(mix)) for mix in MIXES])
    assert np.abs(found.numpy() - expected).max() < 2e-6 * family.loss(family.origin).max()


def test_the_rule_predicts_what_a_merge_reports_as_its_mismatch() -> None:
    family, mix = Family(), np.array([0.2, 0.5, 0.3])
    found = rule_increases(family.block, family.precisions, shares_of(torch.tensor(mix[None]), prior=True))[0]
    base = Diagonal(torch.tensor(family.origin), torch.full((ENTRIES,), PRIOR, dtype=torch.float64))
    for task in range(SOURCES):
        source = Diagonal(torch.tensor(family.centres[task]), torch.tensor(family.curvature[task] + PRIOR))
        assert float(found[task]) == pytest.approx(
            float(mismatch(torch.tensor(family.ruled(mix)), source, base)), rel=1e-4
        )


def test_without_a_prior_nothing_is_left_for_it() -> None:
    weights = torch.tensor([[0.5, 0.2, 0.1], [1.0, 1.0, 1.0]], dtype=torch.float64)
    assert shares_of(weights, prior=False)[:, -1].tolist() == [0.0, 0.0]
    assert shares_of(weights, prior=True)[:, -1].tolist() == pytest.approx([0.2, -2.0])


def test_a_precision_that_is_not_positive_is_nan_unless_there_is_a_floor() -> None:
    family = Family()
    shares = shares_of(torch.tensor([[-3.0, 0.5, 0.5], [0.4, 0.3, 0.3]], dtype=torch.float64), prior=True)
    found = rule_increases(family.block, family.precisions, shares)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert rule_increases(family.block, family.precisions, shares, floor=1e-3).isfinite().all()


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_gathered_by_ratios_the_rule_is_within_a_thousandth(spread: float, scale: float) -> None:
    family, mixes = Family(spread=spread), torch.tensor(random_mixes(SOURCES, 200, seed=2, concentration=0.4)) * scale
    ratios = SharedRatios(SOURCES, prior=scale != 1.0)
    for part in (slice(0, 150), slice(150, None)):
        ratios.add(Block(*(rows[:, part] for rows in family.block)), family.precisions[:, part])
    exact = rule_increases(family.block, family.precisions, shares_of(mixes, prior=True)).numpy()
    error = np.abs(ratios.increases(mixes).numpy() - exact) / family.loss(family.origin)
    assert error.max() < 1e-3
    assert np.sqrt((error**2).mean()) < 4e-4


def test_gathered_corners_are_the_experts_themselves() -> None:
    family, ratios = Family(), SharedRatios(SOURCES, prior=False)
    ratios.add(family.block, family.precisions)
    found = ratios.increases(torch.eye(SOURCES, dtype=torch.float64)).numpy()
    expected = np.array([family.loss(centre) for centre in family.centres])
    assert np.abs(found - expected).max() < 1e-5 * family.loss(family.origin).max()


def test_a_source_without_a_say_in_some_entries_is_left_out_there() -> None:
    family = Family()
    precisions = family.precisions.clone()
    precisions[0, :50] = 0.0
    precisions[-1] = 0.0
    mixes = torch.tensor(random_mixes(SOURCES, 20, seed=4))
    ratios = SharedRatios(SOURCES, prior=False)
    ratios.add(family.block, precisions)
    exact = rule_increases(family.block, precisions, shares_of(mixes, prior=False))
    assert float((ratios.increases(mixes) - exact).abs().max()) < 1e-3 * family.loss(family.origin).max()


def test_too_many_ratios_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 3"):
        SharedRatios(5, prior=False)


def test_products_under_kronecker_curvature_are_those_of_full_matrices() -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    rows, columns = 4, 3
    roots = [(generator.normal(size=(rows, rows)), generator.normal(size=(columns, columns))) for _ in range(SOURCES)]
    factors = [(g @ g.T, a @ a.T) for g, a in roots]
    origin, *means = generator.normal(size=(SOURCES + 1, rows, columns))
    prior = torch.tensor(PRIOR, dtype=torch.float64)
    labels = [f"source {t}" for t in range(SOURCES)]
    sources = {
        label: Kronecker(torch.tensor(mean), prior, [Term(torch.tensor(a), torch.tensor(g))])
        for label, mean, (g, a) in zip(labels, means, factors, strict=True)
    }
    forms = QuadraticForms(SOURCES)
    add_products(forms, Piece(Isotropic(torch.tensor(origin), PRIOR), sources, 0, rows * columns), labels)
    moves = np.array(means) - origin
    expected = []
    for mix in MIXES:
        gaps = [(np.tensordot(mix, moves, axes=1) - move).reshape(-1) for move in moves]
        expected.append([gap @ np.kron(g, a) @ gap / 2 for gap, (g, a) in zip(gaps, factors, strict=True)])
    assert np.allclose(forms.increases(torch.tensor(MIXES)).numpy(), expected, rtol=1e-9, atol=1e-9)
