"""Lattices, random mixes, scalings, and the order in which they are looked at."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.preview.design import (
    in_order_of_spread,
    lattice,
    lattice_size,
    partitions_within,
    random_mixes,
    scaled,
)


@pytest.mark.parametrize(("sources", "partitions", "size"), [(2, 10, 11), (3, 10, 66), (3, 20, 231), (4, 10, 286)])
def test_lattices_have_the_known_sizes(sources: int, partitions: int, size: int) -> None:
    mixes = lattice(sources, partitions)
    assert len(mixes) == len(set(mixes)) == lattice_size(sources, partitions) == size


@given(st.integers(1, 5), st.integers(1, 7))
def test_lattices_hold_every_multiple_that_sums_to_one(sources: int, partitions: int) -> None:
    counts = {tuple(round(partitions * weight) for weight in mix) for mix in lattice(sources, partitions)}
    every = {c for c in np.ndindex(*[partitions + 1] * sources) if sum(c) == partitions}
    assert counts == every
    assert all(math.isclose(math.fsum(mix), 1.0) for mix in lattice(sources, partitions))


def test_the_finest_lattice_within_a_size() -> None:
    assert partitions_within(3, 66) == 10
    assert partitions_within(3, 65) == 9
    assert partitions_within(5, 1) == 1


def test_random_mixes_are_on_the_simplex_repeatable_and_continued_by_more_of_them() -> None:
    mixes = random_mixes(3, 40, seed=5, concentration=0.7)
    assert mixes[:10] == random_mixes(3, 10, seed=5, concentration=0.7)
    assert mixes != random_mixes(3, 40, seed=6, concentration=0.7)
    assert np.allclose(np.sum(mixes, axis=1), 1)
    assert np.min(mixes) >= 0


def test_uniform_random_mixes_have_the_moments_of_the_uniform_distribution() -> None:
    mixes = np.array(random_mixes(3, 4000, seed=0))
    assert np.allclose(mixes.mean(axis=0), 1 / 3, atol=0.02)
    assert np.allclose(mixes.var(axis=0), 2 / (9 * 4), atol=0.005)


def test_scalings_multiply_and_drop_repetitions() -> None:
    assert scaled([(1.0, 0.0), (0.5, 0.5)], [1.0, 2.0]) == ((1.0, 0.0), (0.5, 0.5), (2.0, 0.0), (1.0, 1.0))
    assert scaled([(0.1 + 0.2, 0.7), (0.3, 0.7)], [1.0]) == ((0.3, 0.7),)


def test_any_first_few_mixes_cover_the_simplex() -> None:
    mixes = lattice(3, 10)
    order = in_order_of_spread(mixes)
    assert sorted(order) == sorted(mixes)
    assert set(order[1:4]) == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)}
    few = np.array(order[:15])
    gaps = [np.linalg.norm(few - np.array(mix), axis=1).min() for mix in mixes]
    assert max(gaps) < 0.3  # a lattice of 15 mixes leaves gaps of 0.24 to the nearest
    assert in_order_of_spread(()) == ()
