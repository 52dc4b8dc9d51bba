"""Noise is one stream, whoever draws which part of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mergekit_bayes.finetune.ivon import noise as noise_module
from mergekit_bayes.finetune.ivon.noise import PREDICT, KeyedNoise, aligned, stream_key

CPU = torch.device("cpu")


def drawn(*ranges: tuple[int, int], key: int = 12345) -> list[Tensor]:
    return KeyedNoise().normal(CPU, key, ranges)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "CHUNK_ON_CPU", 128)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 5)],
        [(0, 128), (128, 256)],
        [(0, 700), (704, 1500), (1536, 1537)],
        [(3, 130), (130, 131), (500, 900)],
        [(64, 64), (64, 100), (128, 128)],
        [(127, 129), (129, 385), (2000, 2048)],
    ],
    ids=str,
)
def test_a_part_of_the_stream_is_that_part_of_the_whole(ranges: list[tuple[int, int]]) -> None:
    (stream,) = drawn((0, 2048))
    for (begin, end), part in zip(ranges, drawn(*ranges), strict=True):
        assert torch.equal(part, stream[begin:end])


@pytest.mark.usefixtures("short_chunks")
def test_neighbours_share_memory_and_begin_where_vector_loads_are_fast() -> None:
    places = [0, *itertools.accumulate(aligned(size) for size in (100, 64, 1, 300))]
    parts = drawn(*((at, at + size) for at, size in zip(places, (100, 64, 1, 300), strict=False)))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert all(part.data_ptr() % 64 == 0 for part in parts)
    assert [part.numel() for part in parts] == [100, 64, 1, 300]


def test_a_long_range_is_drawn_in_whole_chunks() -> None:
    size = noise_module.CHUNK_ON_CPU
    (long,), (first,), (last,) = drawn((0, 3 * size)), drawn((10, size)), drawn((2 * size, 2 * size + 7))
    assert torch.equal(long[10:size], first)
    assert torch.equal(long[2 * size : 2 * size + 7], last)


def test_streams_differ_in_every_part_of_their_key() -> None:
    keys = [
        stream_key(0, 0, 0),
        stream_key(1, 0, 0),
        stream_key(0, 1, 0),
        stream_key(0, 0, 1),
        stream_key(0, 0, 0, purpose=PREDICT),
        stream_key(0, 0, 0, rank=1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 63 for key in keys)
    heads = torch.stack([drawn((0, 4000), key=key)[0] for key in keys])
    correlations = torch.corrcoef(heads) - torch.eye(len(keys))
    assert correlations.abs().max() < 5 / 4000**0.5


def test_numbers_are_standard_normal_within_and_across_streams() -> None:
    long = drawn((0, 400_000))[0].double()
    heads = torch.cat([drawn((0, 4), key=stream_key(0, draw, 0))[0] for draw in range(5000)]).double()
    for numbers in (long, heads):
        count = numbers.numel()
        moments = [float((numbers**power).mean()) for power in (1, 2, 3, 4)]
        for seen, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
            assert abs(seen - expected) < 4.5 * (variance / count) ** 0.5
        lagged = float((numbers[1:] * numbers[:-1]).mean())
        assert abs(lagged) < 4.5 / count**0.5
