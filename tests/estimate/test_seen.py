"""What is seen of a pass: notes, the figure, lines and the bar."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from mergekit_bayes.estimate.notes import notes_on
from mergekit_bayes.estimate.passes import GroupSummary
from mergekit_bayes.estimate.picture import draw_convergence
from mergekit_bayes.estimate.progress import follow
from mergekit_bayes.estimate.rows import Feed
from mergekit_bayes.precision.convergence import Change, Convergence
from mergekit_bayes.precision.estimator import Counts
from mergekit_bayes.precision.rank import Shortfall
from tests.finetune.tiny_rows import text_rows

STEADY = Change(100, 50, {"a": 0.1, "b": 0.02})
FEED = Feed(text_rows(10), 10, 2, pad_token_id=0, seed=0)


def notes(*groups: GroupSummary, feed: Feed = FEED) -> list[str]:
    return notes_on(feed, groups, weight_decay=1e-6)


def test_nothing_is_said_of_an_estimate_without_faults() -> None:
    assert notes(GroupSummary(Counts(10, 100), ((STEADY,),), ())) == []


def test_skipped_rows_are_said_once_for_all_groups() -> None:
    groups = [GroupSummary(Counts(3, 30, skipped), ((STEADY,),), ()) for skipped in ((7, 1), (1, 2, 3, 4, 5))]
    (note,) = notes(*groups)
    assert note == "skipped row 2, row 3, row 4, row 5, row 6 and 1 more: gradients, inputs or logits are not finite"


def test_the_worst_factor_is_named() -> None:
    short = (Shortfall("w", "input", 20, 30), Shortfall("v", "output", 5, 40), Shortfall("v", "input", 5, 10))
    (note,) = notes(GroupSummary(Counts(3, 30), ((STEADY,),), short))
    assert note.startswith(
        "factors of 2 layers lack full rank: the output factor of v has 40 dimensions and was seen 5 times."
    )
    assert "a merge has the prior (weight_decay 1e-06) and its own shrinkage alone" in note


def test_an_estimate_that_moves_is_said() -> None:
    moving = Change(100, 50, {"a": 0.5})
    (note,) = notes(GroupSummary(Counts(3, 30), ((STEADY,), (STEADY, moving)), ()))
    assert note.startswith("the estimate moved by 50% over the last half of the rows")


def test_a_summary_survives_its_record() -> None:
    summary = GroupSummary(Counts(3, 30, (4, 5)), ((STEADY,), ()), (Shortfall("w", "input", 2, 3),))
    assert GroupSummary.of(summary.record()) == summary


def test_the_figure_is_a_picture_and_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    series = {"group 1, pass 1": [STEADY, Change(200, 100, {"a": 0.05, "b": 0.01})], "group 2, pass 1": [STEADY]}
    draw_convergence(tmp_path / "one.png", series, unit="token")
    draw_convergence(tmp_path / "two.png", series, unit="token")
    one = (tmp_path / "one.png").read_bytes()
    assert one.startswith(b"\x89PNG")
    assert one == (tmp_path / "two.png").read_bytes()


def convergence() -> Convergence:
    found = Convergence({"w": torch.zeros(4)})
    for units, value in ((10, 1.0), (20, 4.0)):
        found.record(units, {"w": torch.full((4,), value)})
    return found


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(show=True, rows=40, groups=2) as progress:
        progress.advance(0, 0, 10, Convergence({"w": torch.zeros(4)}))
        progress.advance(1, 1, 20, convergence())
    assert capsys.readouterr().err.splitlines() == [
        "group 1/2, row 10/40",
        "group 2/2, pass 2, row 20/40  moves by 50.0%",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with follow(show=True, rows=40, groups=1) as progress:
        progress.advance(0, 0, 20, convergence())
    shown = terminal.getvalue()
    assert "20/40" in shown
    assert "moves by 50.0%" in shown


def test_nothing_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(show=False, rows=40, groups=1) as progress:
        progress.advance(0, 0, 20, convergence())
    assert capsys.readouterr().err == ""
