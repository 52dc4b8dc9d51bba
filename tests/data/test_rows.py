"""Rows: what went in comes out, counted in the units of a summed loss."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.data import Rows
from mergekit_bayes.data.rows import Encoded, mixture
from tests.data.made import encoded, examples, rows_of

LISTS = st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=6), max_size=5)


@given(LISTS)
def test_rows_come_out_as_they_went_in(content: list[list[tuple[int, bool]]]) -> None:
    given_rows = [
        Encoded(np.array([t for t, _ in row], np.int32), np.array([i > 0 and m for i, (_, m) in enumerate(row)], bool))
        for row in content
    ]
    rows = Rows(given_rows, task="causal_lm")
    assert len(rows) == len(content)
    for row, expected in zip(rows, content, strict=True):
        assert row["input_ids"] == [token for token, _ in expected]
        assert row["labels"] == [t if i > 0 and mark else -100 for i, (t, mark) in enumerate(expected)]
        assert "segments" not in row
        assert "token_type_ids" not in row
    units = [sum(mark for _, mark in row[1:]) for row in content]
    assert rows.units.tolist() == units
    assert rows.num_units == sum(units)
    assert rows.num_tokens == sum(map(len, content))
    assert rows.num_units_of(range(len(content))) == sum(units)
    assert rows.largest_token == max((token for row in content for token, _ in row), default=0)


def test_units_are_the_tokens_that_a_model_is_scored_on() -> None:
    """Those of transformers' loss, which shifts the labels by one."""
    row = rows_of(5)[0]
    assert rows_of(5).num_units == sum(label != -100 for label in row["labels"][1:])


def test_units_of_a_classifier_are_its_examples() -> None:
    rows = examples(2, 0, 1)
    assert (rows.num_units, rows.num_units_of([0, 0, 1])) == (3, 3)
    assert [row["labels"] for row in rows] == [2, 0, 1]


def test_rows_behave_as_a_sequence() -> None:
    rows = rows_of(2, 3, 4)
    assert rows[-1] == rows[2]
    assert rows[1:] == [rows[1], rows[2]]
    assert rows[np.int64(1)] == rows[1]
    with pytest.raises(IndexError):
        rows[3]
    with pytest.raises(IndexError):
        rows[-4]


def test_rows_travel_to_other_processes() -> None:
    rows = rows_of(2, 3)
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


def test_the_fingerprint_tells_training_data_apart() -> None:
    rows = encoded(3, 4)
    changed_token = dataclasses.replace(rows[0], tokens=rows[0].tokens + 1)
    changed_target = dataclasses.replace(rows[0], targets=np.array([False, True, False]))
    packed = [dataclasses.replace(row, segments=(len(row.tokens),)) for row in rows]
    variants = [rows, rows[::-1], rows[:1], [changed_token, rows[1]], [changed_target, rows[1]], packed, encoded(4, 3)]
    prints = [Rows(variant, task="causal_lm").fingerprint for variant in variants]
    for weight in (None, 1.0, 2.0):
        parts = [("a", rows[:1], weight), ("b", rows[1:], weight and 1.0)]
        prints.append(mixture(parts, task="causal_lm").fingerprint)
    prints += [examples(0, 1).fingerprint, examples(1, 0).fingerprint]
    assert len(set(prints)) == len(prints)
    assert Rows(encoded(3, 4), task="causal_lm").fingerprint == prints[0]
