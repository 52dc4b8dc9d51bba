"""A fixed noise sequence in place of the optimizer's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Replayed:
    """Stands in for KeyedNoise: hands out given tensors in order."""

    def __init__(self, sequence: Iterable[Tensor]) -> None:
        self._sequence = iter(sequence)

    def normal(
        self, device: torch.device, key: int, ranges: Sequence[tuple[int, int]], *, room: Tensor | None = None
    ) -> list[Tensor]:
        return [next(self._sequence).to(device, torch.float32).flatten().clone() for _ in ranges]
