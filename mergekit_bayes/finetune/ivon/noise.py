"""Normal numbers that depend on a key alone: a run that resumes, or another process, draws the same ones."""

from __future__ import annotations

import struct
from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["KeyedNoise", "stream_key"]

TRAIN, PREDICT = 0, 1


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
    """Draws standard normal tensors, one generator per device; the global generators are left alone."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def normal(self, like: Tensor, key: int, index: int) -> Tensor:
        """Returns float32 normal numbers of the shape and on the device of a tensor.

        Args:
            like: gives shape and device.
            key: of the stream, from `stream_key`.
            index: of the parameter in the optimizer.
        """
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device)
        generator = self._generators[like.device]
        # the generator on CPU uses 32 bits of its seed: adding to them keeps the parameters of a step apart
        generator.manual_seed((key & ~0xFFFFFFFF) | ((key + index) & 0xFFFFFFFF))
        return torch.empty(like.shape, dtype=torch.float32, device=like.device).normal_(generator=generator)
