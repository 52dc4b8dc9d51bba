"""Dealing rows: the steps of a run do not depend on how many processes and micro-batches share them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.data import batches, collate, epoch_order, evaluation_batches, steps_per_epoch
from mergekit_bayes.data.rows import Rows
from tests.data.made import examples, rows_of

LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=40)
SMALL = st.integers(1, 4)


def dealt(rows: Rows, *, batch_size: int, world: int, accumulation: int, epoch: int = 0) -> list[list[list[list[int]]]]:
    """[step][rank][micro-batch] -> rows."""
    options = {"seed": 5, "epoch": epoch, "batch_size": batch_size, "world": world, "accumulation": accumulation}
    ranks = [list(batches(rows, rank=rank, **options)) for rank in range(world)]
    assert len({tuple(units for _, units in steps) for steps in ranks}) == 1
    return [[micro for micro, _ in step] for step in zip(*ranks, strict=True)]


@given(LENGTHS, SMALL, SMALL, SMALL)
def test_a_step_has_the_same_rows_however_it_is_shared(
    lengths: list[int], batch_size: int, world: int, accumulation: int
) -> None:
    rows = rows_of(*lengths)
    size = batch_size * world * accumulation
    order = epoch_order(rows, seed=5, epoch=0)
    expected = [sorted(order[start : start + size]) for start in range(0, len(order), size)]
    steps = dealt(rows, batch_size=batch_size, world=world, accumulation=accumulation)
    assert [sorted(i for rank in step for micro in rank for i in micro) for step in steps] == expected
    assert len(steps) == steps_per_epoch(rows, batch_size=batch_size, world=world, accumulation=accumulation)


@given(LENGTHS, SMALL, SMALL, SMALL)
def test_every_process_works_equally_often(lengths: list[int], batch_size: int, world: int, accumulation: int) -> None:
    """Else collective operations would wait for each other; whole steps have full micro-batches."""
    rows = rows_of(*lengths)
    size = batch_size * world * accumulation
    for step in dealt(rows, batch_size=batch_size, world=world, accumulation=accumulation):
        counts = [len(rank) for rank in step]
        sizes = [len(micro) for rank in step for micro in rank]
        assert len(set(counts)) == 1
        assert 1 <= counts[0] <= accumulation
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        if sum(sizes) == size:
            assert set(sizes) == {batch_size}
            assert counts[0] == accumulation


@given(LENGTHS, SMALL, SMALL, SMALL)
def test_units_are_those_of_the_whole_step(lengths: list[int], batch_size: int, world: int, accumulation: int) -> None:
    rows = rows_of(*lengths)
    options = {"batch_size": batch_size, "world": world, "accumulation": accumulation}
    units = [units for _, units in batches(rows, seed=5, epoch=0, **options)]
    steps = dealt(rows, **options)
    assert units == [rows.num_units_of(itertools.chain(*itertools.chain(*step))) for step in steps]
    assert sum(units) == rows.num_units


@given(LENGTHS, SMALL, SMALL)
def test_evaluation_sees_every_row_once(lengths: list[int], batch_size: int, world: int) -> None:
    rows = rows_of(*lengths)
    ranks = [list(evaluation_batches(rows, batch_size=batch_size, rank=rank, world=world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for batch in rank for i in batch) == list(range(len(rows)))
    assert max(len(batch) for rank in ranks for batch in rank) <= batch_size


def test_rows_of_similar_length_meet() -> None:
    """Of 64 rows of two lengths, no micro-batch of 8 has both."""
    rows = rows_of(*[2, 9] * 32)
    (step,) = dealt(rows, batch_size=8, world=2, accumulation=4)
    assert all(len({int(rows.lengths[i]) for i in micro}) == 1 for rank in step for micro in rank)


def test_epochs_differ() -> None:
    rows = rows_of(*[2] * 16)
    first, second = (dealt(rows, batch_size=4, world=1, accumulation=1, epoch=epoch) for epoch in (0, 1))
    assert first != second


def test_a_process_without_rows_gets_a_batch_that_teaches_nothing() -> None:
    """Its loss, summed, is zero, and so are its gradients."""
    import torch

    (step,) = dealt(rows_of(3), batch_size=2, world=3, accumulation=2)
    assert step == [[[0]], [[]], [[]]]
    batch = collate([], pad_token_id=7, task="causal_lm")
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[7]],
        "labels": [[-100]],
        "attention_mask": [[1]],
    }
    batch = collate([], pad_token_id=7, task="sequence_classification")
    logits = torch.randn(1, 3, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()  # type: ignore[union-attr]


def test_classes_are_dealt_as_texts_are() -> None:
    steps = dealt(examples(0, 1, 2, 0, 1), batch_size=2, world=2, accumulation=1)
    assert [sum(len(micro) for rank in step for micro in rank) for step in steps] == [4, 1]
