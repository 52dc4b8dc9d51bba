"""Intervals of differences: their coverage by simulation, grouped examples, several runs, and bad input."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict import Score, calibration_gaps, paired_interval, paired_intervals


def average(values: Tensor) -> Score:
    return Score("average", values.double()[:, None], lambda averages: averages[..., 0])


def calibration(confidence: Tensor, correct: Tensor, bins: int = 10) -> Score:
    return Score("ece", calibration_gaps(confidence, correct, bins=bins), lambda averages: averages.abs().sum(-1))


def test_of_an_average_it_is_the_interval_of_a_mean_of_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2000, generator=generator)
    second = first + 0.1 + 0.5 * torch.randn(2000, generator=generator)
    found = paired_interval(average(first), average(second), resamples=10_000)
    moves = (second - first).double()
    half = NormalDist().inv_cdf(0.975) * float(moves.std()) / math.sqrt(2000)
    assert found.difference == pytest.approx(float(moves.mean()))
    assert found.low == pytest.approx(found.difference - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.difference + half, abs=0.1 * half)
    assert found.excludes_zero
    assert (found.units, found.resamples, found.level) == (2000, 10_000, 0.95)


def test_what_both_share_cancels() -> None:
    """Paired: the spread of the examples, however large, does not count, only that of the differences."""
    shared = 1000 * torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = paired_interval(average(shared), average(shared + 0.25))
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))
    none = paired_interval(average(shared), average(shared))
    assert (none.low, none.difference, none.high) == (0, 0, 0)
    assert not none.excludes_zero


def covered(simulate: object, truth: float, runs: int, **options: float) -> float:
    hits = 0
    for run in range(runs):
        found = paired_interval(*simulate(torch.Generator().manual_seed(run)), resamples=500, seed=run, **options)
        hits += found.low <= truth <= found.high
    return hits / runs


@pytest.mark.slow
def test_coverage_of_a_difference_of_accuracies() -> None:
    def simulate(generator: torch.Generator) -> tuple[Score, Score]:
        luck = torch.rand(150, generator=generator)
        other = torch.where(torch.rand(150, generator=generator) < 0.5, luck, torch.rand(150, generator=generator))
        return average(luck < 0.7), average(other < 0.8)

    # 600 runs at 95%: standard error 0.9%
    assert covered(simulate, 0.1, 600) == pytest.approx(0.95, abs=0.03)
    assert covered(simulate, 0.1, 600, level=0.8) == pytest.approx(0.80, abs=0.05)


@pytest.mark.slow
def test_coverage_of_a_difference_of_calibration_errors() -> None:
    """One model is right 20 points less often than it says, the other 5 points, whatever it says."""

    def simulate(generator: torch.Generator) -> tuple[Score, Score]:
        sure = 0.5 + 0.5 * torch.rand(400, generator=generator, dtype=torch.float64)
        luck = torch.rand(400, generator=generator, dtype=torch.float64)
        return calibration(sure, luck < sure - 0.2), calibration(sure, luck < sure - 0.05)

    assert covered(simulate, -0.15, 400) == pytest.approx(0.95, abs=0.04)


@pytest.mark.slow
def test_coverage_of_grouped_tokens() -> None:
    """Tokens of a document go together; resampling tokens as if they were independent covers far too rarely."""

    def simulate(generator: torch.Generator) -> tuple[Score, Score]:
        lengths = torch.randint(5, 40, (80,), generator=generator)
        groups = torch.repeat_interleave(torch.arange(80), lengths)
        effect = 0.3 * torch.randn(80, generator=generator)[groups]
        noise = 0.3 * torch.randn(len(groups), generator=generator)
        simulate.groups = groups
        return average(torch.zeros(len(groups))), average(0.1 + effect + noise)

    by_group = by_token = 0
    for run in range(200):
        scores = simulate(torch.Generator().manual_seed(run))
        for grouped in (True, False):
            found = paired_interval(*scores, groups=simulate.groups if grouped else None, resamples=400, seed=run)
            hit = found.low <= 0.1 <= found.high
            by_group, by_token = by_group + (grouped and hit), by_token + (not grouped and hit)
    assert by_group / 200 == pytest.approx(0.95, abs=0.04)
    assert by_token / 200 < 0.6


def test_groups_keep_averages_over_examples() -> None:
    values = torch.tensor([0.0, 0.0, 0.0, 4.0])
    found = paired_interval(average(torch.zeros(4)), average(values), groups=torch.tensor([7, 7, 7, 2]))
    assert found.difference == 1.0
    assert found.units == 2
    assert (found.low, found.high) == (0.0, 4.0)


def test_several_runs_are_averaged_within_every_resample() -> None:
    generator = torch.Generator().manual_seed(2)
    firsts = [average(torch.randn(500, generator=generator)) for _ in range(3)]
    seconds = [average(1 + torch.randn(500, generator=generator)) for _ in range(3)]
    found = paired_interval(firsts, seconds)
    assert found.difference == pytest.approx(sum(s.value for s in seconds) / 3 - sum(f.value for f in firsts) / 3)
    single = paired_interval(firsts[0], seconds[0])
    assert found.high - found.low < 0.7 * (single.high - single.low)


def test_it_depends_on_the_seed_alone() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    one, two = (paired_interval(average(values), average(values.square()), seed=5) for _ in range(2))
    assert one == two
    assert one != paired_interval(average(values), average(values.square()), seed=6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((5, 6), {}, r"scores of \[5, 6\] examples"),
        ((5, 5), {"groups": torch.zeros(4)}, "a group for each"),
        ((5, 5), {"groups": torch.zeros(5)}, "1 independent units"),
        ((1, 1), {}, "1 independent units"),
        ((5, 5), {"level": 1.0}, "level 1.0"),
        ((5, 5), {"resamples": 10}, "10 resamples"),
    ],
)
def test_bad_input_is_refused(sizes: tuple[int, int], options: dict[str, object], message: str) -> None:
    with pytest.raises(EvaluateError, match=message):
        paired_interval(*(average(torch.ones(size)) for size in sizes), **options)


def test_many_differences_are_those_one_by_one() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = [average(torch.rand(60, generator=generator)) for _ in range(3)]
    scores.append(calibration(torch.rand(60, generator=generator), torch.rand(60, generator=generator) < 0.5))
    pairs = {(i, j): (scores[i], scores[j]) for i in range(4) for j in range(i)}
    found = paired_intervals(pairs, resamples=300, seed=7)
    assert found == {key: paired_interval(*pair, resamples=300, seed=7) for key, pair in pairs.items()}
    with pytest.raises(EvaluateError, match=r"scores of \[60, 61\] examples"):
        paired_intervals({**pairs, (9, 9): (average(torch.rand(61)), average(torch.rand(61)))})


def test_coverage_of_a_difference_of_losses_per_token_of_rows() -> None:
    """Rows of many and of few tokens, which two models find hard or easy together: a loss is a ratio of two sums."""
    generator = torch.Generator().manual_seed(8)
    true, runs, hits = 0.05, 300, 0

    def loss(nats: Tensor, tokens: Tensor) -> Score:
        return Score("loss", torch.stack([nats, tokens], -1), lambda averages: averages[..., 0] / averages[..., 1])

    for run in range(runs):
        tokens = (5 + 200 * torch.rand(80, generator=generator, dtype=torch.float64) ** 3).round()
        hard = 2 + 0.5 * torch.randn(80, generator=generator, dtype=torch.float64)
        better = hard - true + 0.2 * torch.randn(80, generator=generator, dtype=torch.float64)
        found = paired_interval(loss(hard * tokens, tokens), loss(better * tokens, tokens), resamples=400, seed=run)
        hits += found.low <= -true <= found.high
    # 95 % of 300 runs, less what few effective rows take and three standard errors
    assert 0.89 <= hits / runs <= 0.985
