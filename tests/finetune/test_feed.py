"""The data of every step, from any step on."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from mergekit_bayes.data import steps_per_epoch
from mergekit_bayes.finetune.feed import Feed, StepData
from tests.finetune.tiny_rows import text_rows

ROWS = text_rows(11)


def feed(**options: int) -> Feed:
    return Feed(rows=ROWS, pad_token_id=0, seed=3, **{"batch_size": 2, **options})  # type: ignore[arg-type]


def take(source: Feed, count: int, *, first: int = 0) -> list[StepData]:
    each = steps_per_epoch(ROWS, batch_size=source.batch_size, world=source.world, accumulation=source.accumulation)
    return list(islice(source.steps(first=first, steps_per_epoch=each), count))


def same(left: StepData, right: StepData) -> bool:
    pairs = zip(left.micro_batches, right.micro_batches, strict=True)
    tensors = all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)
    return tensors and (left.units, left.tokens) == (right.units, right.tokens)


@pytest.mark.parametrize("first", [1, 5, 6, 9, 13])
def test_a_feed_that_starts_later_goes_on_as_the_other_did(first: int) -> None:
    whole = take(feed(), 16)
    late = take(feed(), 16 - first, first=first)
    assert all(same(left, right) for left, right in zip(whole[first:], late, strict=True))


def test_workers_deal_the_same_batches() -> None:
    assert all(map(same, take(feed(), 4), take(feed(workers=1), 4)))


def test_units_of_a_run_are_those_of_its_steps() -> None:
    source = feed(accumulation=2)
    steps = take(source, 8)
    assert source.units(8, 3) == sum(step.units for step in steps)
    assert source.units(3, 3) == ROWS.num_units


def test_processes_share_a_step() -> None:
    parts = [take(feed(world=2, rank=rank), 3) for rank in (0, 1)]
    whole = take(feed(batch_size=4), 3)
    for left, right, both in zip(*parts, whole, strict=True):
        assert left.units == right.units == both.units
        assert left.tokens + right.tokens == both.tokens


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(feed(), 8)
    assert torch.equal(torch.get_rng_state(), before)
