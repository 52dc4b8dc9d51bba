"""Which rows are looked at: shares of an epoch, blocks that no number of processes changes, names for people."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.data.rows import Encoded, Rows, mixture
from mergekit_bayes.estimate.rows import Feed
from tests.finetune.tiny_rows import text_rows


def feed(rows: Rows, num_examples: int, *, batch_size: int = 3, rank: int = 0, world: int = 1, seed: int = 0) -> Feed:
    return Feed(rows, num_examples, batch_size, pad_token_id=0, seed=seed, rank=rank, world=world)


def numbers(found: Feed, block: list[int]) -> list[int]:
    return [int(row) for batch in found.batches(block) for row in batch["row"]]


@given(
    rows=st.integers(1, 60), asked=st.integers(1, 80), batch_size=st.integers(1, 9), world=st.integers(1, 4),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_every_row_is_looked_at_once_by_one_process(
    rows: int, asked: int, batch_size: int, world: int, seed: int
) -> None:
    data = text_rows(rows)
    alone = feed(data, asked, batch_size=batch_size, seed=seed)
    assert len(alone.order) == len(set(alone.order)) == min(rows, asked)
    assert [row for block in alone.blocks for row in block] == alone.order
    for block in alone.blocks:
        shared = [
            numbers(feed(data, asked, batch_size=batch_size, rank=rank, world=world, seed=seed), block)
            for rank in range(world)
        ]
        assert sorted(row for each in shared for row in each) == sorted(block)
    assert alone.units == int(data.units[alone.order].sum())
    assert alone.tokens == int(data.lengths[alone.order].sum())


@pytest.mark.parametrize(
    ("asked", "batch_size", "blocks"),
    [(1, 8, 1), (4, 8, 4), (16, 8, 8), (64, 8, 8), (100, 8, 13), (500, 8, 25)],
)
def test_there_are_enough_blocks_to_see_the_estimate_move(asked: int, batch_size: int, blocks: int) -> None:
    assert len(feed(text_rows(asked), asked, batch_size=batch_size).blocks) == blocks


def test_batches_hold_the_tensors_of_their_rows() -> None:
    data = text_rows(10)
    found = feed(data, 10, batch_size=4)
    for batch in (batch for block in found.blocks for batch in found.batches(block)):
        assert len(batch["row"]) <= 4
        for place, row in enumerate(batch["row"].tolist()):
            length = int(data.lengths[row])
            assert batch["input_ids"][place, :length].tolist() == data[row]["input_ids"]
            assert int(batch["attention_mask"][place].sum()) == length
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_rows_are_named_by_their_data_set() -> None:
    import numpy as np

    def some(count: int) -> list[Encoded]:
        return [Encoded(np.zeros(2, np.int32), label=0) for _ in range(count)]

    rows = mixture([("code", some(3), None), ("docs", some(2), None)], task="sequence_classification")
    found = feed(rows, 5)
    assert [found.name(row) for row in (0, 2, 3, 4)] == [
        "row 1 of code",
        "row 3 of code",
        "row 1 of docs",
        "row 2 of docs",
    ]
