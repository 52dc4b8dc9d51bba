"""How sure a difference between two scores is: intervals from resampling the examples both were measured on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict.scores import Score

__all__ = ["Interval", "paired_interval", "paired_intervals"]

Scores: TypeAlias = Score | Sequence[Score]
"""A score, or the same score of several runs"""

K = TypeVar("K", bound=Hashable)

_CHUNK = 1 << 22  # counts held at once
_ONE = torch.ones(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Interval:
    """A difference of two scores with its uncertainty.

    Attributes:
        difference: second minus first, on all examples.
        low: end of the interval.
        high: other end.
        level: coverage aimed at.
        units: what was resampled: examples, or groups of them.
        resamples: how often.
    """

    difference: float
    low: float
    high: float
    level: float
    units: int
    resamples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is told from none at this level."""
        return self.low > 0 or self.high < 0


def paired_interval(
    first: Scores,
    second: Scores,
    *,
    groups: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of second minus first, with examples resampled for both alike.

    Bias-corrected percentiles (Efron 1981): a calibration error is larger on a resample than on the data, because bins
    that are right on average no longer are; plain percentiles would inherit that. For averages, such as accuracy
    and nll, the correction is almost nothing. It answers for the examples, not for the training run: give several runs
    of each as sequences, and their scores are averaged within every resample, but that they are these runs stays fixed.

    Args:
        first: a score, or the same score of several runs, on the same examples.
        second: what it is compared with, on the same examples.
        groups: number of the group each example belongs to, (examples,), where groups are what is independent: rows or
            documents of tokens. Groups are then resampled, and averages stay averages over examples.
        level: coverage.
        resamples: how many.
        seed: of the resampling.

    Raises:
        EvaluateError: numbers of examples that differ, fewer than two units, an impossible level or number of
            resamples.
    """
    pairs = {"": (first, second)}
    return paired_intervals(pairs, groups=groups, level=level, resamples=resamples, seed=seed)[""]


def paired_intervals(
    pairs: Mapping[K, tuple[Scores, Scores]],
    *,
    groups: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> dict[K, Interval]:
    """The intervals of many differences, each that of `paired_interval`, from one and the same resamples.

    Args:
        pairs: what is compared with what, all on the same examples.
        groups: as for `paired_interval`.
        level: coverage of each.
        resamples: how many.
        seed: of the resampling.

    Raises:
        EvaluateError: as `paired_interval`.
    """
    known = {key: (_several(first), _several(second)) for key, (first, second) in pairs.items()}
    lengths = {len(score.parts) for both in known.values() for scores in both for score in scores}
    if len(lengths) != 1 or not (groups is None or set(groups.shape) == lengths):
        seen = f"interval: scores of {sorted(lengths)} examples"
        raise EvaluateError(f"{seen}; expected the same examples in all, and a group for each where there are groups")
    if not 0 < level < 1 or resamples < 100:
        raise EvaluateError(f"interval: level {level}, {resamples} resamples; expected a level in (0, 1), 100 or more")
    sizes, places = _units(lengths.pop(), groups)
    if len(sizes) < 2:
        raise EvaluateError(f"interval: {len(sizes)} independent units; expected two or more to resample")

    def differences(counts: Tensor) -> dict[K, Tensor]:
        return {
            key: _average_score(seconds, counts, sizes, places) - _average_score(firsts, counts, sizes, places)
            for key, (firsts, seconds) in known.items()
        }

    observed = differences(torch.ones(1, len(sizes), dtype=torch.float64))
    drawn = [differences(counts) for counts in _resampled_counts(len(sizes), resamples, seed)]
    found = {}
    for key, value in observed.items():
        low, high = _corrected(torch.cat([each[key] for each in drawn]), float(value), level)
        found[key] = Interval(float(value), low, high, level, len(sizes), resamples)
    return found


def _several(score: Scores) -> Sequence[Score]:
    return (score,) if isinstance(score, Score) else score


def _units(examples: int, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Examples in each unit, and the unit of each example."""
    if groups is None:
        return torch.ones(examples, dtype=torch.float64), torch.arange(examples)
    _, places, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return counts.double(), places


def _resampled_counts(units: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each resample holds each unit, (some resamples, units)."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // units)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = torch.randint(units, (count, units), generator=generator)
        yield torch.zeros(count, units, dtype=torch.float64).scatter_add_(1, drawn, _ONE.expand(count, units))


def _average_score(scores: Sequence[Score], counts: Tensor, sizes: Tensor, places: Tensor) -> Tensor:
    """The score of every resample, averaged over runs, (resamples,)."""
    total = torch.zeros(len(counts), dtype=torch.float64)
    weight = (counts @ sizes)[:, None]
    for score in scores:
        sums = torch.zeros(len(sizes), score.parts.shape[1], dtype=torch.float64).index_add_(0, places, score.parts)
        total += score.combine(counts @ sums / weight)
    return total / len(scores)


def _corrected(replicates: Tensor, observed: float, level: float) -> tuple[float, float]:
    normal, total = NormalDist(), len(replicates)
    # half of the ties, and never 0 or 1, where the correction would be infinite
    below = float((replicates < observed).double().mean() + (replicates == observed).double().mean() / 2)
    bias = normal.inv_cdf(min(max(below, 0.5 / total), 1 - 0.5 / total))
    edge = normal.inv_cdf((1 + level) / 2)
    ends = [normal.cdf(2 * bias + sign * edge) for sign in (-1, 1)]
    low, high = torch.quantile(replicates, torch.tensor(ends, dtype=replicates.dtype)).tolist()
    return low, high
