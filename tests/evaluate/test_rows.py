"""Rows of an evaluation: cut into batches and blocks that depend on nothing but the rows."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from mergekit_bayes.data.rows import Encoded, Rows
from mergekit_bayes.evaluate.rows import Feed


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
