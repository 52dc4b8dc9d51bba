"""Trimming keeps exactly the largest entries, the first of equal ones; elections go by sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.merge.consensus import elect, trim

FEW_VALUES = st.lists(st.integers(-3, 3), min_size=1, max_size=40)


@given(FEW_VALUES, st.floats(0.001, 0.999))
def test_trim_keeps_the_first_of_the_largest(values: list[int], density: float) -> None:
    count = max(1, int(density * len(values)))
    kept = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))[:count]
    wanted = [float(value) if index in kept else 0.0 for index, value in enumerate(values)]
    assert trim(torch.tensor(values, dtype=torch.float32), density).tolist() == wanted


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 4)])
def test_everything_or_nothing(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trim(values, 1.0), values)
    assert torch.equal(trim(values, 0.0), torch.zeros(shape))
    assert trim(values, 0.5).shape == shape


def test_rescaling_keeps_the_sum_of_magnitudes() -> None:
    values = torch.tensor([4.0, -3.0, 2.0, -1.0])
    assert trim(values, 0.5, rescale=True).tolist() == pytest.approx([40 / 7, -30 / 7, 0, 0])
    assert trim(values * 1e-9, 0.5, rescale=True).tolist() == pytest.approx([4e-9, -3e-9, 0, 0]), "too small for it"


def test_an_election() -> None:
    votes = torch.tensor([[3.0, -1.0, 0.0, 1.0], [-2.0, -1.0, 0.0, -1.0], [0.0, 1.5, 0.0, 0.0]])
    positive = [[True, False, False, True], [False, False, False, False], [False, False, False, False]]
    assert elect(votes[:, [0, 0, 2, 3]], undecided=1.0)[:, [0, 2, 3]].tolist() == [
        [row[0], row[2], row[3]] for row in positive
    ]
    assert elect(votes, undecided=0.0)[:, 1].tolist() == [True, True, False], "the sum is negative"
    assert not elect(votes, undecided=0.0)[:, 3].any(), "nobody wins where the votes cancel"
