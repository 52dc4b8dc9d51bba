"""Fronts and their measures against brute force on random points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergekit_bayes.preview import front

# a coarse grid, so that points tie and repeat
GRID = st.integers(-3, 6).map(float)
POINTS = st.integers(2, 4).flatmap(
    lambda tasks: arrays(np.float64, st.tuples(st.integers(1, 9), st.just(tasks)), elements=GRID)
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a >= b).all() and (a > b).any())


@given(POINTS)
def test_the_non_dominated_set_is_that_of_the_definition(points: np.ndarray) -> None:
    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert front.non_dominated(points).tolist() == expected


@given(POINTS)
def test_the_hypervolume_counts_the_cells_that_are_dominated(points: np.ndarray) -> None:
    cells = itertools.product(range(6), repeat=points.shape[1])
    expected = sum(any((point >= np.array(cell) + 1).all() for point in points) for cell in cells)
    assert front.hypervolume(points, np.zeros(points.shape[1])) == pytest.approx(expected)


@given(POINTS, st.data())
def test_igd_plus_is_the_mean_distance_that_is_missing(points: np.ndarray, data: st.DataObject) -> None:
    references = data.draw(arrays(np.float64, (3, points.shape[1]), elements=GRID))
    short = [min(np.linalg.norm(np.maximum(r - a, 0)) for a in points) for r in references]
    assert front.igd_plus(points, references) == pytest.approx(np.mean(short), abs=1e-9)


def test_points_with_nan_are_nowhere() -> None:
    points = np.array([[1.0, np.nan], [0.5, 0.5], [0.2, 0.1]])
    assert front.non_dominated(points).tolist() == [False, True, False]
    assert front.hypervolume(points, np.zeros(2)) == pytest.approx(0.25)
    assert front.max_min(points) == 1
    assert front.task_best(points, 0) == 1
    lost = np.full((2, 2), np.nan)
    assert (front.max_min(lost), front.knee(lost), front.task_best(lost, 1)) == (None, None, None)
    assert front.hypervolume(lost, np.zeros(2)) == 0.0


def test_losses_are_turned_and_tasks_put_on_the_scale_of_their_experts() -> None:
    scores = np.array([[4.0, 0.5], [3.0, 0.9]])
    assert front.oriented(scores, [False, True]).tolist() == [[-4.0, 0.5], [-3.0, 0.9]]
    turned = front.oriented(scores, [False, True])
    found = front.normalised(turned, base=np.array([-5.0, 0.5]), expert=np.array([-3.0, 0.9]))
    assert np.allclose(found, [[0.5, 0.0], [1.0, 1.0]])
    worse = front.normalised(turned, base=np.array([-3.5, 0.5]), expert=np.array([-4.0, 0.9]))
    assert np.allclose(worse[:, 0], [-1.0, 1.0])  # an expert that lost in its own task is at -1
    assert np.isnan(front.normalised(turned, np.array([-5.0, 0.5]), np.array([-5.0, 0.9]))[:, 0]).all()


def test_the_knee_of_two_lines_is_where_they_meet() -> None:
    first = [(t, 1 - t / 4) for t in np.linspace(0, 0.8, 9)]
    second = [(0.8 + t / 4, 0.8 - t) for t in np.linspace(0, 0.8, 9)[1:]]
    points = np.array(first + second)
    assert points[front.knee(points)] == pytest.approx([0.8, 0.8])
    assert points[front.max_min(points)] == pytest.approx([0.8, 0.8])
    assert front.task_best(points, 0) == len(points) - 1


def test_the_knee_of_a_sphere_is_its_middle_and_one_point_for_all_is_taken() -> None:
    grid = np.array([(a, b, c) for a, b, c in itertools.product(range(21), repeat=3) if a + b + c == 20]) / 20
    sphere = np.sqrt(grid)
    chosen = grid[front.knee(sphere)]
    assert np.abs(chosen - 1 / 3).max() < 0.04
    assert front.knee(np.array([[1.0, 1.0], [0.2, 0.3]])) == 0


@given(arrays(np.float64, 12, elements=GRID), arrays(np.float64, 12, elements=GRID))
def test_rank_correlation_is_that_of_scipy(first: np.ndarray, second: np.ndarray) -> None:
    from scipy.stats import rankdata

    a, b = rankdata(first), rankdata(second)
    if a.std() == 0 or b.std() == 0:
        assert np.isnan(front.rank_correlation(first, second))
    else:
        assert front.rank_correlation(first, second) == pytest.approx(np.corrcoef(a, b)[0, 1])
