"""Rows of an evaluation: cut into batches and blocks that depend on nothing but the rows."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

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
    packed = [Encoded(np.arange(4, dtype=np.int32), np.arange(4) > n, segments=(1, 3)) for n in (1, 2)]
    assert list(spread(Rows(packed, task="causal_lm"), 1)) == [Rows(packed, task="causal_lm")[0]]
