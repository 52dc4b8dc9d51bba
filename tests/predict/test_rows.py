"""Rows of an evaluation: cut into batches and blocks that depend on nothing but the rows."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from mergekit_bayes.data.questions import joined
from mergekit_bayes.data.rows import Encoded, Part, Rows
from mergekit_bayes.predict.rows import Feed, spread


def rows(lengths: list[int]) -> Rows:
    return Rows([Encoded(np.arange(n, dtype=np.int32), np.arange(n) > 0) for n in lengths], task="causal_lm")


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), batch_size=st.integers(1, 7), most=st.integers(1, 9)
)
def test_every_row_is_in_one_batch_of_one_block(lengths: list[int], batch_size: int, most: int) -> None:
    feed = Feed(rows(lengths), batch_size, pad_token_id=0)
    batches, blocks = feed.batches, feed.blocks(most)
    assert [batch for block in blocks for batch in block] == batches
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(blocks) <= most
    assert len({len(block) for block in blocks[:-1]}) <= 1
    assert all(len(batch) == batch_size for batch in batches[:-1])
    found = [lengths[index] for batch in batches for index in batch]
    assert found == sorted(lengths, reverse=True), "rows of similar length are together"


def test_a_batch_is_padded_to_its_longest_row() -> None:
    batch = Feed(rows([2, 4]), 2, pad_token_id=7).batch([1, 0])
    assert torch.equal(batch["input_ids"], torch.tensor([[0, 1, 2, 3], [0, 1, 7, 7]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 1, 2, 3], [-100, 1, -100, -100]]))


def asked(choices: list[list[int]]) -> Rows:
    """Questions whose choices have rows of these lengths; tokens count the questions."""
    found = []
    for number, lengths in enumerate(choices):
        tokens = [np.full(length, number, np.int32) for length in lengths]
        pieces = [Encoded(own, np.arange(len(own)) > 0) for own in tokens]
        found.append(joined(pieces, answer=len(lengths) - 1, sizes=[1] * len(lengths)))
    return Rows(found, task="multiple_choice")


@given(
    choices=st.lists(st.lists(st.integers(2, 9), min_size=2, max_size=6), min_size=1, max_size=20),
    batch_size=st.integers(1, 12),
    most=st.integers(1, 9),
)
def test_the_choices_of_a_question_stay_together(choices: list[list[int]], batch_size: int, most: int) -> None:
    feed = Feed(asked(choices), batch_size, pad_token_id=99)
    order = [index for block in feed.blocks(most) for batch in block for index in batch]
    assert sorted(order) == list(range(len(choices)))
    widths = [max(choices[index]) for index in order]
    assert widths == sorted(widths, reverse=True), "questions of similar length are together"
    for indices in feed.batches:
        batch = feed.batch(indices)
        assert len(batch["input_ids"]) <= batch_size or len(indices) == 1
        assert batch["input_ids"].shape[1] == max(max(choices[index]) for index in indices)
        expected = [index for index in indices for _ in choices[index]]
        assert batch["input_ids"][:, 0].tolist() == expected
        assert batch["choices"].tolist() == [len(choices[index]) for index in indices]
        assert batch["answers"].tolist() == [len(choices[index]) - 1 for index in indices]


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=3), most=st.integers(1, 12))
def test_rows_are_spread_over_every_data_set(counts: list[int], most: int) -> None:
    stops = np.cumsum(counts).tolist()
    parts = [Part(str(n), stop - count, stop) for n, (count, stop) in enumerate(zip(counts, stops, strict=True))]
    whole = Rows(
        [Encoded(np.array([n, n], np.int32), np.array([False, True])) for n in range(stops[-1])],
        task="causal_lm",
        parts=parts,
    )
    found = spread(whole, most)
    assert [len(part) for part in found.parts] == [min(count, most) for count in counts]
    for part, own in zip(parts, found.parts, strict=True):
        places = [row["input_ids"][0] for row in found[own.start : own.stop]]
        assert places == sorted(set(places))
        assert {places[0], places[-1]} <= {part.start, part.stop - 1}
        steps = np.diff(places)
        assert not len(steps) or steps.max() - steps.min() <= 1
    assert spread(whole, None) is whole


def test_rows_that_are_spread_are_whole() -> None:
    classes = [Encoded(np.arange(n, dtype=np.int32), label=n, token_types=np.zeros(n, np.int32)) for n in (2, 3, 4)]
    rows_ = Rows(classes, task="sequence_classification")
    assert list(spread(rows_, 2)) == [rows_[0], rows_[2]]
    questions = asked([[2, 3], [4, 2, 3], [5, 5]])
    assert list(spread(questions, 2)) == [questions[0], questions[2]]
    packed = [Encoded(np.arange(4, dtype=np.int32), np.arange(4) > n, segments=(1, 3)) for n in (1, 2)]
    assert list(spread(Rows(packed, task="causal_lm"), 1)) == [Rows(packed, task="causal_lm")[0]]
