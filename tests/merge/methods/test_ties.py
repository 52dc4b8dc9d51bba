"""TIES: densities of single sources, what is divided by what, and the election that mergekit holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.posterior import Isotropic
from tests.contract.laws import draw
from tests.oracles.ties import oracle

TIES = get_method("ties")


def _merged(base: list[float], sources: list[list[float]], weights: list[float], **options: Any) -> list[float]:
    inputs = [Isotropic(torch.tensor(values), 1.0) for values in (base, *sources)]
    merge = TIES.kernel(inputs[0], inputs[1:], torch.tensor(weights), **options)
    values: list[float] = merge.posterior.mean.tolist()
    return values


@pytest.mark.parametrize("density", [(0.5, 0.2, 0.9), (0.01, 1.0, 0.0)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(0.5, 0.3, 1.0), (1.0, -0.4, 0.7)])
def test_the_oracle_agrees_on_every_option(
    density: tuple[float, ...], normalize: bool, weights: tuple[float, ...]
) -> None:
    base, sources = draw(1, (13, 7))
    merge = TIES.kernel(
        base, sources, torch.tensor(weights, dtype=torch.float64), density=density, normalize=normalize, lambda_=0.7
    )
    wanted, _ = oracle(
        base.mean.numpy(),
        np.ones((13, 7)),
        [each.mean.numpy() for each in sources],
        [],
        weights,
        density=density,
        normalize=normalize,
        scale=0.7,
    )
    np.testing.assert_allclose(merge.posterior.mean.numpy(), wanted, rtol=0, atol=1e-14)


def test_one_density_is_that_of_all_sources() -> None:
    base, sources = draw(2)
    weights = torch.ones(3, dtype=torch.float64)
    one, three = (TIES.kernel(base, sources, weights, density=density) for density in (0.3, (0.3, 0.3, 0.3)))
    assert torch.equal(one.posterior.mean, three.posterior.mean)


def test_votes_that_cancel_elect_the_positive_sign() -> None:
    assert _merged([0.0], [[1.0], [-1.0]], [1.0, 1.0]) == [1.0]
    assert _merged([0.0], [[1.0], [1.0]], [1.0, -1.0]) == [1.0]


def test_weights_that_cancel_divide_by_one() -> None:
    """A task at weight 0.3 agrees with two that are taken away at 0.1 and 0.2: the sum of all three is no divisor."""
    assert _merged([0.0], [[1.0], [-1.0], [-1.0]], [0.3, -0.1, -0.2]) == pytest.approx([0.6])


def test_the_share_of_entries_that_lose_is_measured() -> None:
    merge = TIES.kernel(
        Isotropic(torch.zeros(2), 1.0),
        [Isotropic(torch.tensor(values), 1.0) for values in ([3.0, 1.0], [-1.0, 0.0])],
        torch.ones(2),
    )
    assert merge.measures == {"conflicts": pytest.approx(1 / 3)}
