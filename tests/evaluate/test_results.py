"""What results say beside their numbers, and numbers that are none."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_bayes.evaluate.results import _temperature, results_text
from mergekit_bayes.evaluate.table import tables_of


def outcome(**chosen: Any) -> Any:
    return SimpleNamespace(title="ours", chosen={"nll": 1.0, "nll_of_mean": 1.25, "at_edge": False, **chosen})


def test_what_is_said_of_a_chosen_temperature() -> None:
    assert list(_temperature(outcome(temperature=0.125))) == [
        "ours: temperature 0.125 by the validation rows (nll 1.0000 there, 1.2500 at the mean)"
    ]
    (at_edge,) = _temperature(outcome(temperature=10.0, at_edge=True))
    assert at_edge.endswith(", the highest that was tried: a higher one may be better")
    (none,) = _temperature(outcome(temperature=0.0))
    assert none == "ours: on the validation rows no samples were better than the mean, which stands for them"
    assert list(_temperature(SimpleNamespace(title="ours", chosen=None))) == []


def test_numbers_that_are_not_finite_are_null() -> None:
    content = {"a": [math.inf, 1.5], "b": {"c": math.nan, "d": None, "e": "text"}}
    assert json.loads(results_text(content)) == {"a": [None, 1.5], "b": {"c": None, "d": None, "e": "text"}}


@pytest.mark.parametrize("value", [math.inf, None])
def test_tables_of_models_that_broke(value: float | None) -> None:
    score = {"value": value, "low": None, "high": None}
    difference = {"difference": math.nan, "low": None, "high": None, "higher_is_better": False}
    content = {
        "data": [{"name": "a", "rows": 2}],
        "scores": {"base": {"a": {"loss": {"value": 2.0, "low": 1.5, "high": 2.5}}}, "[ours]": {"a": {"loss": score}}},
        "differences": {"[ours]": {"a": {"loss": difference}}},
        "intervals": {"level": 0.95},
        "baseline": "base",
    }
    from rich.console import Console

    ((line, table),) = tables_of(content)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    assert line == "a: 2 rows; second lines: difference from base, 95% interval"
    text = console.export_text()
    assert "[ours]" in text
    assert "not finite" in text
