r"""How much an estimate still moves: whether more data would change it.

An estimate is a mean over units, so its error falls with the square root of their number. Between n / 2 and n units the
running mean moves by

    m_n - m_(n/2) = (mean of the second half - mean of the first half) / 2

whose root mean square is the standard error of m_n: the change over the last doubling, relative to m_n, is an
estimate of the relative error of what was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.precision.signals import row_generator

__all__ = ["Change", "Convergence", "marks"]

_HALVINGS = 3


class Change(NamedTuple):
    """How far a running mean moved.

    Attributes:
        units: it was taken over.
        since: units it was taken over before.
        by_name: for every tensor, the norm of the difference over the norm of the new mean, at the sampled entries; 0
            where both are 0.
    """

    units: int
    since: int
    by_name: Mapping[str, float]

    @property
    def median(self) -> float:
        """The median over tensors."""
        return float(torch.tensor(list(self.by_name.values()), dtype=torch.float64).median())


def marks(rows: int) -> tuple[int, ...]:
    """Returns after how many rows to record: at 1/8, 1/4, 1/2 and all of them, without repetition."""
    found = {max(1, round(rows / 2**halving)) for halving in range(_HALVINGS + 1)} if rows > 0 else set()
    return tuple(sorted(found))


class Convergence:
    """Keeps running means at a few entries of every tensor.

    Args:
        sums: of an estimator; only names, shapes and devices matter.
        entries: sampled of each tensor; a few less where one was drawn twice.
        seed: of the sample; the same on all processes.

    Attributes:
        records: units and sampled sums of each call of `record`, in order; to be saved with a pass that is interrupted.
    """

    def __init__(self, sums: Mapping[str, Tensor], *, entries: int = 256, seed: int = 0) -> None:
        self._places = {
            name: _places(tensor.numel(), entries, row_generator(seed, index)).to(tensor.device)
            for index, (name, tensor) in enumerate(sorted(sums.items()))
            if tensor.dim() > 0 and tensor.numel() > 0
        }
        self.records: list[tuple[int, dict[str, Tensor]]] = []

    def sample(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sampled entries: small copies, float64 on the CPU, that several processes may add up."""
        return {name: sums[name].flatten()[places].double().cpu() for name, places in self._places.items()}

    def record(self, units: int, sample: Mapping[str, Tensor]) -> None:
        """Keeps a sample of sums over so many units, both added up over processes.

        Raises:
            ValueError: not more units than in the last record.
        """
        if units <= (self.records[-1][0] if self.records else 0):
            raise ValueError(f"a record of {units} units must be of more than the one before, and of at least 1")
        self.records.append((units, dict(sample)))

    def changes(self) -> Sequence[Change]:
        """Returns how far each record moved from the one before."""
        found = []
        for (since, old), (units, new) in zip(self.records, self.records[1:], strict=False):
            moved = {name: _relative(old[name] / since, new[name] / units) for name in sorted(new)}
            found.append(Change(units, since, moved))
        return found

    def since_half(self) -> Sequence[Change]:
        """Returns how far each record moved from the newest one of at most half its units; none without such a one.

        The last of them is the estimate of the relative error; all of them show how it fell.
        """
        found = []
        for place, (units, new) in enumerate(self.records):
            half = [record for record in self.records[:place] if 2 * record[0] <= units]
            if half:
                since, old = half[-1]
                moved = {name: _relative(old[name] / since, new[name] / units) for name in sorted(new)}
                found.append(Change(units, since, moved))
        return found


def _places(size: int, entries: int, generator: torch.Generator) -> Tensor:
    if size <= entries:
        return torch.arange(size)
    drawn: Tensor = torch.randint(size, (entries,), generator=generator).unique()  # type: ignore[no-untyped-call]
    return drawn  # a permutation would be as large as the tensor


def _relative(old: Tensor, new: Tensor) -> float:
    moved, size = float((new - old).norm()), float(new.norm())
    return moved / size if size > 0 else 0.0 if moved == 0 else float("inf")
