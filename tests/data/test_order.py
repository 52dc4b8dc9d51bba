"""The order of rows: every row once, or every data set by its weight; the same on every machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.data import epoch_order, epoch_shares
from mergekit_bayes.errors import DataError
from tests.data.loading import load, texts
from tests.data.made import mixed, rows_of

SEEDS = st.integers(0, 2**32)


@given(st.integers(1, 50), SEEDS, st.integers(0, 5))
def test_without_weights_an_epoch_is_every_row_once(size: int, seed: int, epoch: int) -> None:
    rows = rows_of(*[2] * size)
    order = epoch_order(rows, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(size))
    assert order == epoch_order(rows, seed=seed, epoch=epoch)


def test_seeds_and_epochs_give_different_orders() -> None:
    rows = rows_of(*[2] * 30)
    orders = {tuple(epoch_order(rows, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(rows_of(*[2] * 10), seed=3, epoch=1) == [8, 7, 3, 5, 1, 2, 4, 6, 9, 0]


def test_no_row_is_favoured() -> None:
    """Every row is first about equally often."""
    rows = rows_of(*[2] * 4)
    first = Counter(epoch_order(rows, seed=seed, epoch=0)[0] for seed in range(2000))
    assert all(400 < count < 600 for count in first.values())


MIXTURES = st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 5)), min_size=1, max_size=4)


@given(MIXTURES, SEEDS)
def test_with_weights_every_data_set_gives_its_share(sets: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = zip(*sets, strict=True)
    rows, total = mixed(sizes, weights), sum(weights)
    shares = epoch_shares(rows)
    assert sum(shares) == len(rows)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - len(rows) * weight / total) < 1
    order = epoch_order(rows, seed=seed, epoch=0)
    assert [sum(part.start <= i < part.stop for i in order) for part in rows.parts] == list(shares)


@given(MIXTURES, SEEDS, st.integers(1, 6))
def test_no_row_of_a_data_set_comes_again_before_all_have_come(
    sets: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    """Over all epochs together: the rows of a data set are seen equally often, give or take one."""
    rows = mixed(*zip(*sets, strict=True))
    seen = Counter(index for epoch in range(epochs) for index in epoch_order(rows, seed=seed, epoch=epoch))
    for part in rows.parts:
        counts = [seen[index] for index in range(part.start, part.stop)]
        assert max(counts) - min(counts) <= 1


def test_a_data_set_of_another_weight_keeps_its_own_order() -> None:
    """Data sets of equal weight and size give equally; one that is ten times as heavy is seen over and over."""
    rows = mixed([10, 10], [10.0, 1.0])
    order = epoch_order(rows, seed=0, epoch=0)
    counts = Counter(order)
    assert epoch_shares(rows) == (18, 2)
    assert {counts[index] for index in range(10)} == {1, 2}
    assert sorted(counts[index] for index in range(10, 20)) == [0] * 8 + [1] * 2


def test_weights_and_shares_of_loaded_data(tokenizer: Any) -> None:
    sets = tuple({"rows": texts(*[f"the dog {i}" for i in range(n)]), "weight": w} for n, w in ((6, 1), (2, 3)))
    data = load(sets, tokenizer)
    assert [(part.name, len(part), part.weight) for part in data.train.parts] == [
        ("memory0", 6, 1.0),
        ("memory1", 2, 3.0),
    ]
    assert epoch_shares(data.train) == (2, 6)
    assert [report.share for report in data.report.datasets] == [0.25, 0.75]
    assert data.report.lines()[0].endswith(", 25.0% of an epoch")


def test_a_weight_for_some_data_sets_only(tokenizer: Any) -> None:
    sets = ({"rows": texts("the dog"), "weight": 1}, texts("the fox"))
    with pytest.raises(DataError, match=r"some training data sets have a `weight` and some have none"):
        load(sets, tokenizer)
