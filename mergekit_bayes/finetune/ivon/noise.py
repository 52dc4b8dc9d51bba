"""Normal numbers that depend on a key and a place alone: a run that resumes, or another process, draws the same ones.

All entries of all parameters of an optimizer lie in one stream, in order. The stream is cut into chunks, and a chunk
is drawn by torch's generator from a seed of its own: whoever needs a part of the stream draws the chunks it touches,
so the numbers do not depend on how the parameters are spread over processes or cut into blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "KeyedNoise", "aligned", "room_for", "stream_key"]

TRAIN, PREDICT = 0, 1

ALIGNMENT = 64
"""Every parameter begins at a multiple of it in the stream, and so do its numbers in memory: vector loads are fast."""

CHUNK_ON_CPU = 1 << 15
"""Seeding costs a few percent of drawing that many, and a model with fewer weights draws no more than that."""

CHUNK_ELSEWHERE = 1 << 24
"""On an accelerator a launch costs as much as drawing millions, and a model of any size should take few."""


def aligned(entries: int) -> int:
    """Returns the next multiple of `ALIGNMENT`."""
    return -(-entries // ALIGNMENT) * ALIGNMENT


def stream_key(seed: int, draw: int, sample: int, *, purpose: int = TRAIN, rank: int = 0) -> int:
    """Returns the 63-bit key of one sample of all parameters.

    Args:
        seed: of the optimizer.
        draw: how many samples of all parameters were finished before.
        sample: which of several samples of the same draw.
        purpose: training and prediction never share numbers.
        rank: of the process, where each draws its own numbers; otherwise 0.
    """
    digest = blake2b(struct.pack("<5q", seed, draw, sample, purpose, rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class KeyedNoise:
    """Draws standard normal numbers, one generator per device; the global generators are left alone."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def normal(
        self, device: torch.device, key: int, ranges: Sequence[tuple[int, int]], *, room: Tensor | None = None
    ) -> list[Tensor]:
        """Returns the float32 numbers in some ranges of a stream, flat; neighbours share memory.

        Args:
            device: where the numbers are wanted. Kinds of devices have different streams.
            key: of the stream, from `stream_key`.
            ranges: begin and end of each, in ascending order, without overlap.
            room: where to write them, at least `room_for(ranges)` entries on that device; allocated otherwise.
        """
        size = CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ELSEWHERE
        if room is None:
            room = torch.empty(room_for(ranges), dtype=torch.float32, device=device)
        drawn: list[Tensor] = []
        spare, held = torch.empty(0, device=device), -1  # the chunk drawn last of those that are needed in part
        for begin, end, members in _runs(ranges):
            numbers, room = room[: end - begin], room[aligned(end - begin) :]
            for chunk in range(begin // size, -(-end // size)):
                low, high = max(begin, chunk * size), min(end, (chunk + 1) * size)
                target = numbers[low - begin : high - begin]
                if high - low == size:
                    self._draw(target, key, chunk)
                    continue
                if held != chunk:
                    spare, held = spare if spare.numel() else torch.empty(size, device=device), chunk
                    self._draw(spare, key, chunk)
                target.copy_(spare[low - chunk * size : high - chunk * size])
            drawn += [numbers[first - begin : last - begin] for first, last in members]
        return drawn

    def _draw(self, target: Tensor, key: int, chunk: int) -> None:
        if target.device not in self._generators:
            self._generators[target.device] = torch.Generator(target.device)
        generator = self._generators[target.device]
        # the generator on CPU uses 32 bits of its seed: adding to them keeps the chunks of one stream apart
        generator.manual_seed((key & ~0xFFFFFFFF) | ((key + chunk) & 0xFFFFFFFF))
        target.normal_(generator=generator)


def room_for(ranges: Sequence[tuple[int, int]]) -> int:
    """Returns the entries that the numbers in some ranges take at most, with the gaps that align them."""
    return sum(aligned(end - begin) + ALIGNMENT for begin, end in ranges)


def _runs(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Ranges that follow each other but for the alignment between them, taken together: begin, end, ranges."""
    members: list[tuple[int, int]] = []
    for each in ranges:
        if members and each[0] != aligned(members[-1][1]):
            yield members[0][0], members[-1][1], members
            members = []
        members.append(each)
    if members:
        yield members[0][0], members[-1][1], members
