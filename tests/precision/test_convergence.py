"""How much an estimate moves, against the error it has."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.precision.convergence import Convergence, marks
from mergekit_bayes.precision.rank import Shortfall, rank_shortfalls


def test_marks_are_at_halves() -> None:
    assert marks(80) == (10, 20, 40, 80)
    assert marks(3) == (1, 2, 3)
    assert marks(1) == (1,)
    assert marks(0) == ()


def test_the_last_doubling_tells_the_error_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    units = 800
    noise = torch.randn(units, 4000, generator=generator, dtype=torch.float64)
    followed = Convergence({"a": torch.zeros(40, 100)}, entries=4000)
    for upto in marks(units):
        sums = {"a": (5 + noise[:upto]).sum(0).view(40, 100)}
        followed.record(upto, followed.sample(sums))
    changes = followed.changes()
    assert [(change.since, change.units) for change in changes] == [(100, 200), (200, 400), (400, 800)]
    for change in changes:
        assert change.by_name["a"] == pytest.approx(1 / 5 / change.units**0.5, rel=0.05)
        assert change.median == change.by_name["a"]


def test_samples_of_processes_add_up_and_are_few() -> None:
    sums = {"b": torch.arange(1000.0).view(10, 100), "a": torch.arange(5.0), "places": torch.tensor(3.0)}
    followed = Convergence(sums, entries=16, seed=1)
    sample = followed.sample(sums)
    assert sample.keys() == {"a", "b"}
    assert sample["a"].tolist() == [0, 1, 2, 3, 4]
    assert 12 <= len(set(sample["b"].tolist())) == len(sample["b"]) <= 16
    doubled = followed.sample({name: 2 * value for name, value in sums.items()})
    assert all(torch.equal(doubled[name], 2 * value) for name, value in sample.items())
    again = Convergence(dict(reversed(sums.items())), entries=16, seed=1).sample(sums)
    assert all(torch.equal(again[name], value) for name, value in sample.items())


def test_changes_since_half_of_the_units() -> None:
    followed = Convergence({"a": torch.zeros(1)})
    for units, total in ((10, 10.0), (15, 30.0), (20, 30.0), (40, 80.0)):
        followed.record(units, {"a": torch.tensor([total])})
    found = [(change.since, change.units, change.by_name["a"]) for change in followed.since_half()]
    assert found == [(10, 20, pytest.approx(0.5 / 1.5)), (20, 40, pytest.approx(0.5 / 2.0))]


def test_nothing_is_still_and_records_must_grow() -> None:
    followed = Convergence({"a": torch.zeros(4)})
    followed.record(1, followed.sample({"a": torch.zeros(4)}))
    followed.record(2, followed.sample({"a": torch.zeros(4)}))
    assert followed.changes()[0].by_name == {"a": 0.0}
    with pytest.raises(ValueError, match="more than the one before"):
        followed.record(2, followed.sample({"a": torch.zeros(4)}))


def test_factors_of_too_few_places_are_found() -> None:
    sums = {
        "x.weight.input_factor": torch.zeros(8, 8),
        "x.weight.output_factor": torch.zeros(4, 4),
        "x.weight.places": torch.tensor(6.0),
        "norm.weight": torch.zeros(8),
    }
    assert rank_shortfalls(sums) == [Shortfall("x.weight", "input", 6, 8)]
    assert rank_shortfalls({**sums, "x.weight.places": torch.tensor(8.0)}) == []
