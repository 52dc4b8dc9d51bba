"""Linear regression with a diagonal design: merging posteriors of the parts gives that of the whole.

    y = X w + noise ,  noise ~ N(0, 1/tau) ,  w ~ N(theta_0, diag(1/S_0))

With orthogonal columns in every part, X^T X is diagonal and so is the posterior, S = S_0 + tau X^T X. The
posterior of the whole is computed by solving the normal equations of all data at once, with full matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior, mismatch

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FEATURES, TAU = 12, 3.0


class Data(NamedTuple):
    design: np.ndarray
    target: np.ndarray


def _parts(seed: int, count: int) -> list[Data]:
    """Parts of different sizes, with orthogonal columns of very different lengths: precisions differ."""
    rng = np.random.default_rng(seed)
    truth, parts = rng.normal(size=FEATURES), []
    for part in range(count):
        rows = FEATURES + 5 * part
        orthogonal, _ = np.linalg.qr(rng.normal(size=(rows, FEATURES)))
        design = orthogonal * 10 ** rng.uniform(-1, 1, size=FEATURES)
        parts.append(Data(design, design @ truth + rng.normal(size=rows) / np.sqrt(TAU)))
    return parts


def _posterior(prior_mean: np.ndarray, prior_precision: np.ndarray, parts: list[Data]) -> Diagonal:
    precision = np.diag(prior_precision)
    moment = prior_precision * prior_mean
    for design, target in parts:
        precision = precision + TAU * design.T @ design
        moment = moment + TAU * design.T @ target
    assert np.abs(precision - np.diag(np.diag(precision))).max() < 1e-9, "the problem is diagonal"
    mean = np.linalg.solve(precision, moment)
    return Diagonal(torch.from_numpy(mean), torch.from_numpy(np.diag(precision).copy()))


def _prior(kind: str) -> tuple[np.ndarray, np.ndarray, Posterior]:
    rng = np.random.default_rng(99)
    mean = rng.normal(size=FEATURES)
    if kind == "tensor":
        precision = rng.uniform(0.2, 4.0, size=FEATURES)
        return mean, precision, Diagonal(torch.from_numpy(mean), torch.from_numpy(precision))
    return mean, np.full(FEATURES, 0.7), Isotropic(torch.from_numpy(mean), 0.7)


def _assert_same(seen: Posterior, wanted: Posterior) -> None:
    torch.testing.assert_close(seen.mean, wanted.mean, **EXACT)
    torch.testing.assert_close(seen.precision_tensor(), wanted.precision_tensor(), **EXACT)


@pytest.mark.parametrize("prior", ["scalar", "tensor"])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("method", ["posterior", "gradient_matching"])
def test_merging_the_parts_gives_the_whole(method: str, count: int, prior: str) -> None:
    mean, precision, base = _prior(prior)
    parts = _parts(count, count)
    sources = [_posterior(mean, precision, [part]) for part in parts]
    merged = get_method(method).kernel(base, sources, torch.ones(count, dtype=torch.float64))
    _assert_same(merged, _posterior(mean, precision, parts))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_without_a_prior_hessian_weighting_gives_the_whole(count: int) -> None:
    nowhere, nothing = np.zeros(FEATURES), np.zeros(FEATURES)
    parts = _parts(10 + count, count)
    sources = [_posterior(nowhere, nothing, [part]) for part in parts]
    base = Isotropic(torch.zeros(FEATURES, dtype=torch.float64), 1.0)
    merged = get_method("hessian_weighted").kernel(base, sources, torch.ones(count, dtype=torch.float64))
    _assert_same(merged, _posterior(nowhere, nothing, parts))


@pytest.mark.parametrize("prior", ["scalar", "tensor"])
@pytest.mark.parametrize("method", ["posterior", "gradient_matching"])
def test_a_part_can_be_removed_again(method: str, prior: str) -> None:
    mean, precision, base = _prior(prior)
    kept, removed, other = _parts(20, 3)
    sources = [_posterior(mean, precision, [kept, removed, other]), _posterior(mean, precision, [removed])]
    merged = get_method(method).kernel(base, sources, torch.tensor((1.0, -1.0), dtype=torch.float64))
    _assert_same(merged.check(), _posterior(mean, precision, [kept, other]))


@pytest.mark.parametrize("prior", ["scalar", "tensor"])
def test_weights_are_powers_of_the_likelihoods(prior: str) -> None:
    """Weight 0.25 is data seen a quarter of a time: rows scaled by one half."""
    mean, precision, base = _prior(prior)
    parts, weights = _parts(30, 3), (0.25, 1.7, 4.0)
    sources = [_posterior(mean, precision, [part]) for part in parts]
    tempered = [Data(*(np.sqrt(w) * each for each in part)) for w, part in zip(weights, parts, strict=True)]
    merged = get_method("posterior").kernel(base, sources, torch.tensor(weights, dtype=torch.float64))
    _assert_same(merged, _posterior(mean, precision, tempered))


def test_a_merge_can_be_merged_further() -> None:
    mean, precision, base = _prior("tensor")
    parts = _parts(40, 4)
    kernel, ones = get_method("posterior").kernel, torch.ones(2, dtype=torch.float64)
    sources = [_posterior(mean, precision, [part]) for part in parts]
    halves = [kernel(base, sources[:2], ones), kernel(base, sources[2:], ones)]
    _assert_same(kernel(base, halves, ones), _posterior(mean, precision, parts))


def _loss(weights: np.ndarray, part: Data) -> float:
    return float(TAU * np.square(part.target - part.design @ weights).sum() / 2)


@pytest.mark.parametrize("prior", ["scalar", "tensor"])
def test_the_mismatch_is_the_exact_increase_of_a_quadratic_loss_beyond_its_slope(prior: str) -> None:
    mean, precision, base = _prior(prior)
    parts = _parts(50, 3)
    sources = [_posterior(mean, precision, [part]) for part in parts]
    merged = get_method("posterior").kernel(base, sources, torch.tensor((0.5, 0.3, 0.2), dtype=torch.float64))
    for part, source in zip(parts, sources, strict=True):
        here, there = source.mean.numpy(), merged.mean.numpy()
        slope = TAU * part.design.T @ (part.design @ here - part.target)
        increase = _loss(there, part) - _loss(here, part) - slope @ (there - here)
        assert mismatch(merged.mean, source, base).item() == pytest.approx(increase, rel=1e-9)


def test_the_mismatch_is_the_exact_increase_from_a_minimum() -> None:
    nowhere, nothing = np.zeros(FEATURES), np.zeros(FEATURES)
    parts = _parts(60, 3)
    sources = [_posterior(nowhere, nothing, [part]) for part in parts]
    flat = Isotropic.unchecked(torch.zeros(FEATURES, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    merged = get_method("linear").kernel(flat, sources, torch.full((3,), 1 / 3, dtype=torch.float64))
    for part, source in zip(parts, sources, strict=True):
        increase = _loss(merged.mean.numpy(), part) - _loss(source.mean.numpy(), part)
        assert mismatch(merged.mean, source, flat).item() == pytest.approx(increase, rel=1e-9)
