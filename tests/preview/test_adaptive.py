"""Adaptive designs find more of a front than designs of the same size that are laid down beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_bayes.preview.adaptive import next_mixes
from mergekit_bayes.preview.design import Mix, in_order_of_spread, lattice
from mergekit_bayes.preview.front import hypervolume

BUDGET, START, ROUND = 24, 10, 2
DESIGN = in_order_of_spread(lattice(3, 20))


class Family:
    """Three tasks with random quadratic losses; gains of weighted sums of the experts, which are the minima."""

    def __init__(self, seed: int) -> None:
        generator = np.random.Generator(np.random.PCG64(seed))
        self.centres = generator.normal(size=(3, 30)) + generator.normal(size=30)  # they have something in common
        self.curvature = np.exp(1.5 * generator.normal(size=(3, 30)))
        self.at_base = self.loss(np.zeros(30))

    def loss(self, mean: np.ndarray) -> np.ndarray:
        return np.array([(h * (mean - c) ** 2).sum() for h, c in zip(self.curvature, self.centres, strict=True)])

    def gains(self, mix: Mix) -> np.ndarray:
        return 1 - (self.loss(np.array(mix) @ self.centres) / self.at_base) ** 0.7  # no polynomial


def volume(gains: list[np.ndarray]) -> float:
    return hypervolume(np.stack(gains), np.zeros(3))


def adapted(family: Family) -> float:
    known = {mix: family.gains(mix) for mix in DESIGN[:START]}
    while len(known) < BUDGET:
        known |= {mix: family.gains(mix) for mix in next_mixes(DESIGN, known, min(ROUND, BUDGET - len(known)))}
    return volume(list(known.values()))


def test_the_front_is_larger_than_that_of_a_grid_of_the_same_size() -> None:
    wins, ratios = 0, []
    for seed in range(10):
        family = Family(seed)
        every = volume([family.gains(mix) for mix in DESIGN])
        uniform = volume([family.gains(mix) for mix in DESIGN[:BUDGET]])
        grid = volume([family.gains(mix) for mix in lattice(3, 5)])  # 21 mixes, the finest grid within the budget
        found = adapted(family)
        wins += found > max(uniform, grid)
        ratios.append((every - found) / (every - uniform))
    assert wins >= 9
    assert np.median(ratios) < 0.75  # of what a uniform design misses


def test_without_anything_to_foresee_from_the_design_goes_on() -> None:
    assert next_mixes(DESIGN, {}, 3) == list(DESIGN[:3])
    broken = {mix: np.full(3, np.nan) for mix in DESIGN[:8]}
    assert next_mixes(DESIGN, broken, 2) == list(DESIGN[8:10])


def test_a_design_that_is_nearly_used_up_ends() -> None:
    family = Family(0)
    known = {mix: family.gains(mix) for mix in DESIGN[:-2]}
    assert sorted(next_mixes(DESIGN, known, 5)) == sorted(DESIGN[-2:])
    assert next_mixes(DESIGN, {mix: family.gains(mix) for mix in DESIGN}, 5) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_chosen_is_decided_by_what_is_known(seed: int) -> None:
    family = Family(seed)
    known = {mix: family.gains(mix) for mix in DESIGN[:12]}
    first = next_mixes(DESIGN, known, 4)
    assert first == next_mixes(DESIGN, known, 4)
    assert len(set(first)) == 4
    assert not set(first) & set(known)
